"""Context parallelism: the rows of one packed sequence, dealt over several ranks.

Each context-parallel rank holds neighbouring rows, cut where the work is shared evenly, and
computes their attention. Every layer gathers the rotated keys and values of all ranks (one
all-gather; in the backward pass one reduce-scatter of their gradients), so that what a row sees is
said in rows of the whole sequence, and a trunk, a stem or a branch may be cut anywhere. Other
tensors are never gathered in a layer. Queries stay, and so do the rows of the head.

A rank's activations, its products and its scores are a share. Keys and values are whole where a
layer computes with them, and so are those that it keeps for the backward pass, unless activations
are recomputed. A ring, as of Transformer Engine, would keep a share of them too, and wants equal
parts of plain sequences. Llama 3 gathers as this module does (arXiv 2407.21783), and so does pull
request 7387 of Megatron-LM for trees.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rmt.model.blocks import Block, keys_of_rows


@dataclass(frozen=True)
class RowSplit:
    """Which rows each rank of ``group`` holds: rank r those of ``[bounds[r], bounds[r + 1])``."""

    bounds: tuple[int, ...]
    group: ProcessGroup

    @property
    def own(self) -> slice:
        """The rows of this rank; there may be none."""
        rank = self.group.rank()
        return slice(self.bounds[rank], self.bounds[rank + 1])

    @property
    def sizes(self) -> list[int]:
        """Number of rows of each rank."""
        return [limit - first for first, limit in zip(self.bounds, self.bounds[1:], strict=False)]

    def holds(self, rows: Tensor) -> Tensor:
        """Bool, whether this rank holds each of ``rows``, int64 numbers of rows."""
        return (rows >= self.own.start) & (rows < self.own.stop)


def context_parallel_group() -> ProcessGroup | None:
    """The ranks that share each sequence, None where a rank has its own alone."""
    group = parallel_state.get_context_parallel_group(check_initialized=False)
    return None if group is None or group.size() == 1 else group


def balanced_bounds(
    blocks: Sequence[Block], ranks: int, *, row_cost: int, pair_cost: int
) -> tuple[int, ...]:
    """Bounds of ``ranks`` parts of the rows of ``blocks``, which cost the same up to one row.

    row_cost, pair_cost: whole numbers, of a row and of a (query, key) pair that see each other.
    With rows alone the last rank would have most pairs, with pairs alone the first one most rows.
    """
    up_to = (row_cost + pair_cost * keys_of_rows(blocks)).cumsum(0)
    total = int(up_to[-1]) if len(up_to) else 0
    shares = torch.tensor([total * rank // ranks for rank in range(1, ranks)], dtype=torch.int64)
    # A row goes where more than half of it lies.
    middles = up_to - up_to.diff(prepend=up_to.new_zeros(1)) // 2
    inner = torch.searchsorted(middles, shares, right=True)
    return 0, *inner.tolist(), len(up_to)


def gather_keys(
    query: Tensor, key: Tensor, value: Tensor, split: RowSplit
) -> tuple[Tensor, Tensor, Tensor]:
    """``query`` as it is, and ``key`` and ``value`` ``[own rows, kv heads, dim]`` of all ranks'
    rows, differentiable.

    Collective over ``split.group``: one all-gather, in backward one reduce-scatter, in the dtype of
    the keys. The query passes through, so that backward gets here on every rank, also on one of
    whose output nothing depends on keys.
    """
    return _GatheredKeys.apply(query, key, value, split)


class _GatheredKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, split):
        ctx.split = split
        whole = _gather_rows(torch.cat([key, value], dim=-1), split)
        keys, values = whole.split([key.shape[-1], value.shape[-1]], dim=-1)
        return query.view_as(query), keys, values

    @staticmethod
    def backward(ctx, of_query, of_keys, of_values):
        own = _sum_rows(torch.cat([of_keys, of_values], dim=-1), ctx.split)
        of_key, of_value = own.split([of_keys.shape[-1], of_values.shape[-1]], dim=-1)
        return of_query, of_key, of_value, None


def _gather_rows(own: Tensor, split: RowSplit) -> Tensor:
    """``own`` ``[own rows, ...]`` of all ranks, one after the other. Parts travel padded to the
    largest."""
    sizes = split.sizes
    longest, ranks = max(sizes), len(sizes)
    padded = F.pad(own, (0, 0) * (own.dim() - 1) + (0, longest - len(own))).contiguous()
    parts = own.new_empty(ranks * longest, *own.shape[1:])
    dist.all_gather_into_tensor(parts, padded, group=split.group)
    return torch.cat([part[:size] for part, size in zip(parts.chunk(ranks), sizes, strict=True)])


def _sum_rows(whole: Tensor, split: RowSplit) -> Tensor:
    """The sum over all ranks of their ``whole`` ``[rows, ...]``: this rank's rows of it."""
    sizes = split.sizes
    longest, rank = max(sizes), split.group.rank()
    parts = whole.new_zeros(len(sizes), longest, *whole.shape[1:])
    for part, own in zip(parts, whole.split(sizes), strict=True):
        part[: len(own)] = own
    summed = torch.empty_like(parts[rank])
    dist.reduce_scatter_tensor(summed, parts.flatten(0, 1), group=split.group)
    return summed[: sizes[rank]]


def on_all_ranks(own: Tensor, held: Tensor, split: RowSplit) -> Tensor:
    """``[..., count]`` numbers of which each rank has ``own``, where ``held`` ``[count]`` is true.

    One all-reduce of all of them with zeros elsewhere, so that every rank gets the same bits.
    """
    whole = own.new_zeros(*own.shape[:-1], len(held))
    whole[..., held] = own
    dist.all_reduce(whole, group=split.group)
    return whole


def alone() -> ProcessGroup | None:
    """A group of this rank by itself, where there are context-parallel ranks; else None.

    With it Megatron leaves its table of rotary positions whole, of which it would else keep the
    part for a batch dealt its own way.
    """
    return None if context_parallel_group() is None else _group_of_this_rank()


@functools.cache
def _group_of_this_rank() -> ProcessGroup:
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)
