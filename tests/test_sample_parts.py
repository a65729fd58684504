"""Samples put together of what context-parallel ranks are given of them."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_rmt.job.sample_parts import join_parts, joined
from megatron_rmt.rollout.trunk import UserBatch
from tests.distributed import run_distributed

LENGTH = 24
FIELDS = ("tokens", "position_ids", "labels", "loss_mask")


def _batch(reset: bool = False) -> UserBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 50, (2, LENGTH + 1), generator=generator)
    positions = torch.arange(LENGTH).repeat(2, 1)
    if reset:
        # Documents that begin within a piece, and at the first token of one.
        positions[0, 5:] -= 5
        positions[1, 12:] -= 12
    mask = (torch.rand(2, LENGTH, generator=generator) < 0.8).float()
    return UserBatch(tokens[:, :-1], positions, tokens[:, 1:], mask)


def _own_part(batch: UserBatch) -> UserBatch:
    """As Megatron cuts it."""
    group = parallel_state.get_context_parallel_group()
    fields = {name: getattr(batch, name).clone() for name in FIELDS}
    return UserBatch(**get_batch_on_this_cp_rank(fields, is_hybrid_cp=False, cp_group=group))


def _joined_on_ranks(reset: bool) -> list[tuple[UserBatch, Tensor, UserBatch]]:
    parallel_state.initialize_model_parallel(
        context_parallel_size=torch.distributed.get_world_size()
    )
    whole = _batch(reset)
    part = _own_part(whole)
    found = [join_parts(part), join_parts(whole)]
    assert not any(of.problem for of in found)
    return [(of.batch, of.columns, own) for of, own in zip(found, (part, whole), strict=True)]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("ranks", "reset"), [(2, False), (3, True)])
def test_parts_and_whole_samples_become_the_same(ranks: int, reset: bool):
    whole = _batch(reset)
    for of_rank in run_distributed(ranks, _joined_on_ranks, reset):
        for batch, columns, own in of_rank:
            for name in FIELDS:
                value = getattr(whole, name)
                assert torch.equal(getattr(batch, name), value), name
                assert torch.equal(value[:, columns], getattr(own, name)), name


def _pieces(batch: UserBatch, columns: list[list[int]]) -> list[UserBatch]:
    return [UserBatch(*(getattr(batch, name)[:, own] for name in FIELDS)) for own in columns]


@pytest.mark.parametrize(
    "columns",
    [
        [[*range(12)], [*range(12, 24)]],
        [[*range(0, 24, 2)], [*range(1, 24, 2)]],
        [[*range(10)], [*range(10, 24)]],
        [[*range(11)], [*range(11, 22)]],
    ],
    ids=["halves", "alternating", "uneven", "odd"],
)
def test_samples_that_are_cut_otherwise_are_refused(columns: list[list[int]]):
    for rank in range(2):
        problem = joined(_pieces(_batch(), columns), rank).problem
        assert problem.startswith("forward_step_func gives GPTModel.forward parts of samples that")


def test_one_rank_has_whole_samples():
    batch = _batch()
    found = join_parts(batch)
    assert found.batch is batch
    assert found.columns.tolist() == [*range(LENGTH)]
