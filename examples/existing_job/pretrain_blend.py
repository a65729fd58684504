"""A second pre-training job that exists, with the two lines already in it: a weighted blend.

It has what large jobs have: interleaved pipeline stages, context-parallel ranks, a blend of
corpora, whose losses weigh differently (``--corpus-loss-weights``, a flag of this job), a batch
that grows, and validation.
``README.md`` shows how it is started.
"""

import megatron_rmt

megatron_rmt.patch()

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

FIELDS = ("tokens", "labels", "position_ids", "loss_mask")
READ = (*FIELDS[:-1], "dataset_id")

Batches = Iterator[dict[str, Tensor]]


def add_job_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flag of this job."""
    group = parser.add_argument_group("this job")
    group.add_argument("--corpus-loss-weights", type=float, nargs="+", default=[1.0, 1.0])
    return parser


def datasets_provider(sample_counts: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Megatron's blended data sets for training, validation and test."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )

    def is_built_here() -> bool:
        first_rank = parallel_state.get_tensor_model_parallel_rank() == 0
        return first_rank and is_first_or_last_pipeline_stage(vp_stage)

    return BlendedMegatronDatasetBuilder(GPTDataset, sample_counts, is_built_here, config).build()


datasets_provider.is_distributed = True


def get_batch(data_iterator: Batches | None, vp_stage: int | None) -> dict[str, Tensor | None]:
    """Tokens, labels, positions and loss mask ``[micro-batch, sequence / cp]``; None in the middle
    of the pipeline."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(FIELDS)
    sample = None
    if data_iterator is not None:
        read = next(data_iterator)
        sample = {name: read[name].long() for name in READ}
    batch = tensor_parallel.broadcast_data(list(READ), sample, torch.int64)
    weights = torch.tensor(get_args().corpus_loss_weights, device=batch["tokens"].device)
    own = weights[batch.pop("dataset_id")]
    batch["loss_mask"] = own[:, None].expand_as(batch["labels"]).contiguous()
    group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Weighted sum of the next-token losses, number of predictions, and both to be reported."""
    total = (losses.float() * loss_mask).sum()
    predicted = torch.tensor(loss_mask.numel(), dtype=torch.int, device=losses.device)
    return total, predicted, {"lm loss": torch.stack([total.detach(), predicted.float()])}


def forward_step(data_iterator: Batches | None, model: torch.nn.Module) -> tuple[Tensor, Any]:
    """The model, or its chunk on this stage, on the next micro-batch."""
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    losses = model(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(loss_func, batch["loss_mask"])


def main() -> None:
    """Parse the flags of Megatron and of this job, and train."""
    args = parse_and_validate_args(extra_args_provider=add_job_arguments)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )


if __name__ == "__main__":
    main()
