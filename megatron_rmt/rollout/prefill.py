"""Difficulty of every token: the entropy of the policy's own prediction.

H(position) = entropy in nats of pi(. | tokens before it), over the full vocabulary (RPT used the 16
most likely tokens of a small proxy model: ``top_k``). The same pass fills the key-value store that
the rollouts read.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.model.gpt import Policy
from megatron_rmt.model.head import token_entropies, token_loss_sum
from megatron_rmt.model.pipeline import forward_through_stages, from_last_stage
from megatron_rmt.rollout.kv_cache import KeyValueStore, TrunkVisibility
from megatron_rmt.rollout.trunk import Sample, trunk_blocks


class TrunkReading(NamedTuple):
    """What the model predicts in each row of a trunk, on the CPU.

    entropies: ``[rows]`` fp32 in nats. predictions: ``[rows]`` int64, the most likely next tokens.
    log_probs: ``[rows]`` fp32 in nats, of the labels, NaN where there is none; None unless asked
    for.
    """

    entropies: Tensor
    predictions: Tensor
    log_probs: Tensor | None = None


@torch.no_grad()
def read_trunk(
    policy: Policy,
    trunk: Sequence[Sample],
    store: KeyValueStore,
    first_row: int,
    *,
    top_k: int | None = None,
    with_log_probs: bool = False,
) -> TrunkReading:
    """Read one micro-batch's trunk: keys and values go to ``store`` from ``first_row`` on.

    top_k: see ``token_entropies``. with_log_probs: of the labels, a second product of the head. The
    same on every tensor- and pipeline-parallel rank.
    """
    device = policy.device
    tokens = torch.cat([sample.tokens for sample in trunk]).to(device)
    visibility = TrunkVisibility(
        tokens=len(tokens),
        blocks=tuple(trunk_blocks(trunk)),
        attention=policy.attention,
        store=store,
        first_row=first_row,
    )
    position_ids = torch.cat([sample.position_ids for sample in trunk])
    visibility.use_position_ids(position_ids.to(device), policy.longest_position)

    labels = torch.cat([sample.labels for sample in trunk]).to(device)

    def read(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        how = {
            "vocab_size": policy.vocab_size,
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "chunk_size": policy.head_chunk_size,
        }
        entropies, predictions = token_entropies(hidden, weight, top_k=top_k, **how)
        found = [entropies.float(), predictions]
        if with_log_probs:
            _, log_probs = token_loss_sum(
                hidden, weight, labels.clamp(min=0), lambda rows, log_probs: -log_probs, **how
            )
            found.append(log_probs.float().masked_fill(labels < 0, torch.nan))
        return found

    found = forward_through_stages(policy.model, tokens, visibility, read)
    if found is None:
        dtypes = [torch.float32, torch.int64, *[torch.float32] * with_log_probs]
        found = [torch.empty(len(tokens), dtype=dtype, device=device) for dtype in dtypes]
    return TrunkReading(*(from_last_stage(own.contiguous()).cpu() for own in found))


PERCENTILES = (10, 50, 90)
# Entropies are counted in bins, whose counts add up over ranks, in nats.
_BIN = 0.01
_BINS = 1300  # the logarithm of a vocabulary of 400k


class EntropyHistogram:
    """How often each entropy occurs among all data-parallel ranks' ``[tokens]``, to 0.01 nats.

    Whole numbers, so they are the same in every layout. One all-reduce of fixed size over the
    data-parallel group.
    """

    def __init__(self, entropies: Tensor) -> None:
        bins = (entropies / _BIN).long().clamp(0, _BINS - 1)
        counts = torch.bincount(bins.cpu(), minlength=_BINS).to(torch.cuda.current_device())
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
        self._up_to = counts.cumsum(0).cpu()

    def _bin(self, share: Fraction) -> float:
        """In which the smallest entropy lies that ``share`` of all reach at most; NaN of none."""
        total = int(self._up_to[-1])
        if total == 0:
            return math.nan
        return int(torch.searchsorted(self._up_to, max(1, math.ceil(total * share))))

    def percentiles(self) -> dict[int, float]:
        """Of ``PERCENTILES``, each the middle of its bin; NaN where no rank has a token."""
        return {p: (self._bin(Fraction(p, 100)) + 0.5) * _BIN for p in PERCENTILES}

    def quantiles(self, shares: Sequence[float]) -> tuple[float, ...]:
        """The lower end of each quantile's bin, so that with ``>=`` all of the bin counts; NaN
        where no rank has a token."""
        # 0.07 of 100 tokens are 7, which a product of floats may exceed.
        exact = (Fraction(share).limit_denominator(10**6) for share in shares)
        return tuple(self._bin(share) * _BIN for share in exact)
