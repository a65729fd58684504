"""Positions drawn in reserve take the place of those whose groups all earn the same."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_rmt.algorithm.curriculum import choose_by_tier, draw_by_tier
from megatron_rmt.algorithm.rewards import Evidence
from megatron_rmt.mid_training import MidTraining
from megatron_rmt.step import choose
from megatron_rmt.update.reserve import keep_differing
from megatron_rmt.update.tree import ReasonedSample, grow_tree
from tests.packed import reasoned
from tests.tiny_step import rollout, score, tiny_run, tiny_schedule, tiny_trunk

THRESHOLDS = (0.5, 1.0, 1.5)


def _run(select: str = "gain-variance", **changes: int) -> MidTraining:
    chosen = draw_by_tier if select == "gain-variance" else choose_by_tier
    return dataclasses.replace(tiny_run(select=select, **changes), select=chosen)


def _drawn(run: MidTraining, warm_up: bool = False) -> list[ReasonedSample]:
    """Two samples whose positions have been chosen, and responses of different lengths to each."""
    trunk = tiny_trunk([])
    samples = reasoned(trunk, [], None)
    entropies = 2 * torch.rand(len(trunk), generator=torch.Generator().manual_seed(2))
    choose(run, samples, entropies, THRESHOLDS, tiny_schedule(warm_up=warm_up))
    for of in samples:
        for position in of.positions:
            position.rollouts = [rollout([2] * n + [10, 3], [1] * (n + 2)) for n in (1, 2)]
    return samples


def _places(samples: list[ReasonedSample]) -> list[list[tuple[int, int]]]:
    """(row, place in the order of drawing) of every position, in that order."""
    pairs = [[(own.row, own.place) for own in of.positions] for of in samples]
    return [sorted(own, key=lambda pair: pair[1]) for own in pairs]


def test_a_reserve_is_drawn_behind_the_positions_that_there_are_without_it():
    plain, drawn = _drawn(_run("tiers")), _drawn(_run(reserve_positions=3))
    for without, of, in_order in zip(plain, drawn, _places(drawn), strict=True):
        assert [place for _, place in in_order] == [*range(7)]
        assert sorted(row for row, _ in in_order[:4]) == [own.row for own in without.positions]
        rows = [own.row for own in of.positions]
        assert rows == sorted(set(rows))
    assert [len(of.positions) for of in _drawn(_run())] == [8, 8]
    assert [len(of.positions) for of in _drawn(_run(), warm_up=True)] == [4, 4]


@pytest.mark.parametrize("differing", [0.0, 0.3, 0.6, 1.0])
def test_positions_are_kept_as_a_slow_reference_keeps_them(differing: float):
    """The length reward differs in every group; it is what is earned beside it that counts."""
    run = _run(reserve_positions=3)
    samples = _drawn(run)
    rows = sorted({own.row for of in samples for own in of.positions})
    coins = torch.rand(len(rows), generator=torch.Generator().manual_seed(5)) < differing
    differ = dict(zip(rows, coins.tolist(), strict=True))
    in_tree = [own.row for of in samples for own in of.positions]

    def reward(of: Evidence) -> Tensor:
        second = torch.tensor([float(differ[row]) for row in in_tree])
        return torch.stack([torch.zeros_like(second), second], 1)

    schedule = tiny_schedule()
    score(dataclasses.replace(run, reward=reward), schedule, samples)
    assert all(any(own.advantages) for of in samples for own in of.positions)
    expected, replaced, flat = [], 0, 0
    for in_order in _places(samples):
        kept = [pair for pair in in_order if differ[pair[0]]][:4]
        for pair in in_order:
            if len(kept) < 4 and pair not in kept:
                kept.append(pair)
        expected.append(sorted(row for row, _ in kept))
        replaced += sum(place >= 4 for _, place in kept)
        flat += sum(not differ[row] for row, _ in kept)

    metrics = keep_differing(samples, schedule)
    assert [[own.row for own in of.positions] for of in samples] == expected
    assert metrics == {
        "rmt replaced": (replaced, 8.0),
        "rmt kept without variance": (flat, 8.0),
    }
    # Whatever is not trained predicts its token again.
    tree = grow_tree(samples, longest_position=200, device=torch.device("cpu"))
    labelled = sum(int(of.sample.labelled.sum()) for of in samples)
    assert tree.trunk_predictions == labelled - 8


def test_the_warm_up_keeps_everything_and_reports_nothing():
    run = _run()
    samples = _drawn(run, warm_up=True)
    schedule = tiny_schedule(warm_up=True)
    score(run, schedule, samples)
    before = [of.positions[:] for of in samples]
    assert keep_differing(samples, schedule) == {
        "rmt replaced": (0.0, 0.0),
        "rmt kept without variance": (0.0, 0.0),
    }
    assert [of.positions for of in samples] == before
