"""Difficulty of every token: the entropy of the policy's own prediction.

H(position) = entropy in nats of pi(. | tokens before it), over the full vocabulary (RPT used the 16
most likely tokens of a small proxy model: ``top_k``). The same pass fills the key-value store that
the rollouts read.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.model.head import token_entropies
from megatron_rmt.model.pipeline import forward_through_stages, from_last_stage
from megatron_rmt.rollout.kv_cache import KeyValueStore, TrunkVisibility
from megatron_rmt.rollout.trunk import Trunk, trunk_blocks


@torch.no_grad()
def read_trunk(
    model: GPTModel,
    trunk: Trunk,
    store: KeyValueStore,
    first_row: int,
    *,
    vocab_size: int,
    longest_position: int,
    chunk_size: int,
    top_k: int | None = None,
    attention: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Read one micro-batch's trunk: keys and values go to ``store`` from ``first_row`` on.

    attention: a name of ``--rmt-attention``.

    Returns, on every tensor- and pipeline-parallel rank and on the CPU, the entropies ``[rows]``
    fp32 in nats and the most likely next tokens ``[rows]`` int64.
    """
    device = next(model.parameters()).device
    visibility = TrunkVisibility(
        tokens=len(trunk),
        blocks=trunk_blocks(trunk),
        attention=attention,
        store=store,
        first_row=first_row,
    )
    visibility.use_position_ids(trunk.position_ids.to(device), longest_position)

    def read(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return token_entropies(
            hidden,
            weight,
            vocab_size=vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            chunk_size=chunk_size,
            top_k=top_k,
        )

    result = forward_through_stages(model, trunk.tokens.to(device), visibility, read)
    if result is None:
        entropies = torch.empty(len(trunk), device=device)
        predictions = torch.empty(len(trunk), dtype=torch.int64, device=device)
    else:
        entropies, predictions = result[0].float().contiguous(), result[1].contiguous()
    return from_last_stage(entropies).cpu(), from_last_stage(predictions).cpu()


PERCENTILES = (10, 50, 90)
# Entropies are counted in bins, whose counts add up over ranks, in nats.
_BIN = 0.01
_BINS = 1300  # the logarithm of a vocabulary of 400k


def entropy_percentiles(entropies: Tensor) -> dict[int, float]:
    """Percentiles of the entropies ``[tokens]`` of all data-parallel ranks, to 0.01 nats.

    One all-reduce of fixed size over the data-parallel group. NaN where no rank has a token.
    """
    bins = (entropies / _BIN).long().clamp(0, _BINS - 1)
    counts = torch.bincount(bins.cpu(), minlength=_BINS).to(torch.cuda.current_device())
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    below = counts.cumsum(0).cpu()
    total = int(below[-1])
    if total == 0:
        return dict.fromkeys(PERCENTILES, float("nan"))
    ranks = torch.tensor([max(1, -(-total * percentile // 100)) for percentile in PERCENTILES])
    found = torch.searchsorted(below, ranks)
    return {p: (int(b) + 0.5) * _BIN for p, b in zip(PERCENTILES, found, strict=True)}
