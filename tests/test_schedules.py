"""The schedules of a step: budget, curriculum, warm-up."""

import math

import pytest

from megatron_rmt.algorithm.schedules import schedule_of_step
from tests.tiny_step import step_args


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
    schedule = schedule_of_step(step_args(), iteration)
    assert schedule.iteration == iteration
    assert schedule.budget == budget == math.floor(800 * 0.2 ** (min(iteration, 100) / 100) + 1e-9)
    assert schedule.probabilities == pytest.approx(probabilities)
    assert not schedule.warm_up


def test_ablations_and_warm_up_of_the_schedules():
    assert schedule_of_step(step_args(rmt_no_budget_decay=True), 90).budget == 800
    assert schedule_of_step(step_args(rmt_initial_budget=2), 100).budget == 1
    assert schedule_of_step(step_args(rmt_no_curriculum=True), 0).probabilities is None
    args = step_args(rmt_warmup_iters=3)
    plans = [schedule_of_step(args, iteration) for iteration in range(5)]
    assert [schedule.warm_up for schedule in plans] == [1, 1, 1, 0, 0]
    assert not any(schedule.thought_from_text for schedule in plans)
    assert {(schedule.positions_per_sample, schedule.group) for schedule in plans} == {(4, 2)}


def test_responses_from_the_text_are_spread_over_more_positions():
    args = step_args(rmt_warmup_iters=3, rmt_warmup_thought="text")
    plans = [schedule_of_step(args, iteration) for iteration in range(5)]
    assert [schedule.thought_from_text for schedule in plans] == [1, 1, 1, 0, 0]
    shapes = [(schedule.positions_per_sample, schedule.group) for schedule in plans]
    assert shapes == [(8, 1)] * 3 + [(4, 2)] * 2
