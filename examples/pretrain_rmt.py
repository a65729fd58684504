"""Mid-train a model with RMT: a plain Megatron pre-training script with the two added lines.

All flags are Megatron's own plus ``--rmt-*`` (``--help`` lists them). Without ``--rmt`` this is
ordinary pre-training on the same data. Usually started by ``examples/pretrain_rmt.sh``. With
``--save`` the screen has a line for each step, and what Megatron prints is in ``megatron.log``
there; a job of your own needs no ``console``.
"""

import functools
from collections.abc import Iterator
from typing import Any

from megatron_rmt.job import console

console.leave_out_library_warnings()

import megatron_rmt

megatron_rmt.patch()

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_tokenizer, pretrain, print_rank_0
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

BATCH_FIELDS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def _predicts_several(vp_stage: int | None) -> bool:
    """Whether this chunk has the layers of multi-token prediction, which read tokens."""
    layers = get_args().mtp_num_layers
    return mtp_on_this_rank(mtp_num_layers=layers, ignore_virtual=False, vp_stage=vp_stage)


def get_batch(
    data_iterator: Iterator[dict[str, Tensor]] | None, vp_stage: int | None
) -> dict[str, Tensor | None]:
    """The next micro-batch on this rank; middle pipeline stages need none."""
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(BATCH_FIELDS)
    args = get_args()
    batch: dict[str, Tensor | None] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        device = torch.cuda.current_device()
        batch = {
            name: sample[name].to(device, non_blocking=True) if name in sample else None
            for name in BATCH_FIELDS
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_predicts_several(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Next-token loss of a micro-batch: its sum, its number of tokens, what is reported."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask)
    tokens = mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: torch.nn.Module
) -> tuple[Tensor, Any]:
    """One forward pass over the next micro-batch."""
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    with StragglerDetector():  # which --log-straggler turns on
        losses = model(
            batch.get("tokens"),
            batch.get("position_ids"),
            batch.get("attention_mask"),
            labels=batch.get("labels"),
            loss_mask=batch.get("loss_mask"),
        )
    return losses, functools.partial(loss_func, batch.get("loss_mask"))


def datasets_provider(sample_counts: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Megatron's packed GPT datasets for training, validation and test."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def is_built_here() -> bool:
        first_rank = mpu.get_tensor_model_parallel_rank() == 0
        return first_rank and is_first_or_last_pipeline_stage(vp_stage)

    print_rank_0("> building the datasets ...")
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, sample_counts, is_built_here, config).build()


datasets_provider.is_distributed = True


def embedding_ranks(pipeline_ranks: list[int]) -> list[int]:
    """Stages that hold the word embedding: the first, and the last where it is tied, or embeds
    what layers of multi-token prediction read."""
    args = get_args()
    on_last = not args.untie_embeddings_and_output_weights or args.mtp_num_layers
    return sorted({pipeline_ranks[0], *pipeline_ranks[-1:]} if on_last else {pipeline_ranks[0]})


def main() -> None:
    """Parse Megatron's flags and train."""
    args = parse_and_validate_args()
    if args.hybrid_layer_pattern:
        config = hybrid_config_from_args(args)
    else:
        config = gpt_config_from_args(args)
        # Megatron 0.19 drops it (github.com/NVIDIA/Megatron-LM/issues/6305).
        config.rope_scaling_factor = args.rope_scaling_factor
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=embedding_ranks,
    )


if __name__ == "__main__":
    console.a_line_for_each_step()
    main()
