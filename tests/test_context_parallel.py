"""Rows dealt over context-parallel ranks: even work, keys of all ranks, and their gradients."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rmt.model.blocks import Block, keys_of_rows, position_block
from megatron_rmt.model.context_parallel import (
    RowSplit,
    balanced_bounds,
    gather_keys,
    on_all_ranks,
)
from tests.distributed import run_distributed

# A document of 400 tokens with three positions of four rollouts each.
TREE = [Block(0, 400)]
for row in (50, 200, 390):
    TREE.append(position_block(TREE[-1].limit, 0, row + 1, 10, [30, 20, 40, 10]))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("costs", [(0, 1), (1, 0), (100, 1)], ids=str)
def test_parts_cost_alike_up_to_a_row(ranks: int, costs: tuple[int, int]):
    row_cost, pair_cost = costs
    bounds = balanced_bounds(TREE, ranks, row_cost=row_cost, pair_cost=pair_cost)
    assert bounds[0] == 0
    assert bounds[-1] == TREE[-1].limit
    of_rows = row_cost + pair_cost * keys_of_rows(TREE)
    parts = [int(of_rows[first:limit].sum()) for first, limit in itertools.pairwise(bounds)]
    assert max(parts) - min(parts) <= int(of_rows.max())
    assert sum(parts) == int(of_rows.sum())


def test_rows_alone_leave_the_pairs_uneven():
    """What balance by rows would cost: the last of two ranks would have most of the pairs."""
    pairs = keys_of_rows(TREE)
    by_rows = balanced_bounds(TREE, 2, row_cost=1, pair_cost=0)[1]
    by_pairs = balanced_bounds(TREE, 2, row_cost=0, pair_cost=1)[1]
    assert pairs[by_rows:].sum() > 1.2 * pairs[:by_rows].sum()
    assert by_pairs > 1.05 * by_rows


def test_fewer_rows_than_ranks_leave_some_without():
    bounds = balanced_bounds([Block(0, 2)], 4, row_cost=1, pair_cost=1)
    assert (bounds[0], bounds[-1]) == (0, 2)
    assert list(bounds) == sorted(bounds)
    assert balanced_bounds([], 2, row_cost=1, pair_cost=1) == (0, 0, 0)


def _inputs() -> list[Tensor]:
    """Query, key, value of seven rows, and the gradients of what they become on each rank."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 4, 3), (7, 2, 3), (7, 2, 3)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _gathered(bounds: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    split = RowSplit(bounds, dist.group.WORLD)
    own = [x[split.own].clone().requires_grad_() for x in _inputs()]
    query, keys, values = gather_keys(*own, split)
    # Each rank weighs the keys differently; the last one does not read the values.
    weight = 1.0 + dist.get_rank()
    loss = (query * weight).sum() + (keys * keys.detach() * weight).sum()
    if dist.get_rank() < dist.get_world_size() - 1:
        loss = loss + (values * values.detach()).sum()
    loss.backward()
    held = split.holds(torch.arange(7))
    numbers = on_all_ranks(torch.arange(7.0)[held][None] + 0.5, held, split)
    found = [keys.detach(), values.detach()]
    return found, [x.grad for x in own], numbers


@pytest.mark.multiprocess
@pytest.mark.parametrize("bounds", [(0, 3, 7), (0, 7, 7), (0, 1, 5, 7)], ids=str)
def test_keys_are_gathered_and_their_gradients_summed(bounds: tuple[int, ...]):
    ranks = len(bounds) - 1
    query, key, value = _inputs()
    total = sum(range(1, ranks + 1))
    for rank, (found, gradients, numbers) in enumerate(run_distributed(ranks, _gathered, bounds)):
        assert torch.equal(found[0], key)
        assert torch.equal(found[1], value)
        own = slice(bounds[rank], bounds[rank + 1])
        expected = [torch.ones_like(query) * (1 + rank), total * key, (ranks - 1) * value]
        for gradient, whole in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, whole[own], rtol=1e-14, atol=0)
        assert torch.equal(numbers, torch.arange(7.0)[None] + 0.5)
