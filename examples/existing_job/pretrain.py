"""A pre-training job as a company might have it: its own data set, batches, model and loss.

Nothing in this script knows of RMT. It differs from Megatron's own script where jobs differ: every
document is a sample of its own, cut or padded to the sequence length; documents shorter than
``--minimum-document-tokens``, a flag of this job, are left out; padding bears no loss; the model is
put together by hand. ``README.md`` shows the two ways to train it with RMT.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.training import get_args, get_tokenizer, pretrain, print_rank_0
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import (
    core_transformer_config_from_args,
    parse_and_validate_args,
)
from torch import Tensor


def add_job_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of this job."""
    group = parser.add_argument_group("this job")
    group.add_argument("--minimum-document-tokens", type=int, default=16)
    return parser


class DocumentDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """One document a sample, in an order shuffled anew in each epoch, ``samples`` in all."""

    def __init__(self, prefix: str, sequence_length: int, samples: int, seed: int) -> None:
        self.documents = IndexedDataset(prefix)
        self.sequence_length = sequence_length
        self.end_of_document = get_tokenizer().eod
        long_enough = self.documents.sequence_lengths >= get_args().minimum_document_tokens
        candidates = np.flatnonzero(long_enough)
        if not len(candidates):
            raise ValueError(f"{prefix} has no document of --minimum-document-tokens.")
        rng = np.random.default_rng(seed)
        epochs = -(-samples // len(candidates))
        order = [rng.permutation(candidates) for _ in range(epochs)]
        self.order = np.concatenate(order)[:samples]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The document's tokens, one more than the sequence length, and how many are real."""
        document = self.documents[int(self.order[index])][: self.sequence_length + 1]
        text = np.full(self.sequence_length + 1, self.end_of_document, dtype=np.int64)
        text[: len(document)] = document
        return {"text": torch.from_numpy(text), "real": torch.tensor([len(document)])}


def datasets_provider(sample_counts: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Data sets for training and validation, drawn from the same documents; none for the test."""
    args = get_args()
    (prefix,) = args.data_path
    print_rank_0(f"> one document of {prefix} a sample")
    training, validation = (
        DocumentDataset(prefix, args.seq_length, samples, args.seed + number) if samples else None
        for number, samples in enumerate(sample_counts[:2])
    )
    return training, validation, None


def get_batch(
    data_iterator: Iterator[dict[str, Tensor]] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, loss mask and positions, each ``[micro-batch, sequence]``."""
    sample = None if data_iterator is None else next(data_iterator)
    batch = tensor_parallel.broadcast_data(["text", "real"], sample, torch.int64)
    text = batch["text"]
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return tokens, labels, (positions + 1 < batch["real"]).float(), positions


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the next-token losses, number of predicted tokens, and both to be reported."""
    total = (losses.float() * loss_mask).sum()
    predicted = loss_mask.sum().int()
    return total, predicted, {"lm loss": torch.stack([total.detach(), predicted.float()])}


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: torch.nn.Module
) -> tuple[Tensor, Any]:
    """The model on the next micro-batch, and how its output becomes a loss."""
    tokens, labels, loss_mask, positions = get_batch(data_iterator)
    losses = model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=None,
        labels=labels,
        loss_mask=loss_mask,
    )
    return losses, partial(loss_func, loss_mask)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    """This pipeline stage of the model."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    make_layer = (
        get_gpt_layer_with_transformer_engine_spec
        if args.transformer_impl == "transformer_engine"
        else get_gpt_layer_local_spec
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=make_layer(
            qk_layernorm=args.qk_layernorm, normalization=args.normalization
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def main() -> None:
    """Parse the flags of Megatron and of this job, and train."""
    args = parse_and_validate_args(extra_args_provider=add_job_arguments)
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
    )
    if torch.distributed.get_rank() == 0:
        consumed = args.consumed_train_samples
        print(
            f"trained on {consumed} documents, {parallel_state.get_data_parallel_world_size()}-way"
        )


if __name__ == "__main__":
    main()
