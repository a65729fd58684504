"""The schedules of a step: budget, curriculum, warm-up."""

import math
from typing import Any

import pytest

from megatron_rmt.algorithm.schedules import Schedule, longest_budgets, schedule_of_step
from megatron_rmt.algorithm.settings import Settings


def _schedule(iteration: int, **changes: Any) -> Schedule:
    """At one iteration of 100."""
    settings = Settings(**{"positions_per_sample": 4, "group_size": 2} | changes)
    return schedule_of_step(settings, iteration, train_iters=100)


@pytest.mark.parametrize(
    ("iteration", "budget", "probabilities"),
    [
        (0, 800, (0.6, 0.3, 0.1)),
        (30, 493, (0.6, 0.3, 0.1)),
        (40, 420, (0.475, 0.3, 0.225)),
        (50, 357, (0.35, 0.3, 0.35)),
        (70, 259, (0.1, 0.3, 0.6)),
        (100, 160, (0.1, 0.3, 0.6)),
        (130, 160, (0.1, 0.3, 0.6)),
    ],
)
def test_the_schedules_follow_the_paper(iteration, budget, probabilities):
    schedule = _schedule(iteration)
    assert schedule.iteration == iteration
    assert schedule.progress == min(iteration, 100) / 100
    assert schedule.budget == budget == math.floor(800 * 0.2 ** (min(iteration, 100) / 100) + 1e-9)
    assert schedule.probabilities == pytest.approx(probabilities)
    assert not schedule.warm_up


def test_ablations_and_warm_up_of_the_schedules():
    assert _schedule(90, no_budget_decay=True).budget == 800
    assert _schedule(100, initial_budget=2).budget == 1
    assert _schedule(0, no_curriculum=True).probabilities is None
    schedules = [_schedule(iteration, warmup_iters=3) for iteration in range(5)]
    assert [schedule.warm_up for schedule in schedules] == [1, 1, 1, 0, 0]
    assert not any(schedule.thought_from_text for schedule in schedules)
    assert {(schedule.positions_per_sample, schedule.group) for schedule in schedules} == {(4, 2)}


def test_responses_from_the_text_are_spread_over_more_positions():
    schedules = [
        _schedule(iteration, warmup_iters=3, warmup_thought="text") for iteration in range(5)
    ]
    assert [schedule.warm_up for schedule in schedules] == [1, 1, 1, 0, 0]
    assert [schedule.thought_from_text for schedule in schedules] == [1, 1, 1, 0, 0]
    shapes = [(schedule.positions_per_sample, schedule.group) for schedule in schedules]
    assert shapes == [(8, 1)] * 3 + [(4, 2)] * 2


def test_harder_tiers_may_think_longer_and_the_longest_is_at_the_start():
    assert _schedule(50).tier_budgets == (357, 357, 357)
    parts = {"tier_budgets": (0.5, 1.0, 2.0), "minimum_budget": 100}
    schedules = [_schedule(iteration, **parts) for iteration in (0, 50, 100)]
    assert [of.tier_budgets for of in schedules] == [
        (400, 800, 1600),
        (178, 357, 714),
        (100, 160, 320),
    ]
    assert [of.budget for of in schedules] == [800, 357, 160]
    assert longest_budgets(Settings(**parts)) == (400, 800, 1600)
