"""The schedules of a step: budget, curriculum, warm-up."""

import math

import pytest

from megatron_rmt.schedules import plan_step
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
    plan = plan_step(step_args(), iteration)
    assert plan.iteration == iteration
    assert plan.budget == budget == math.floor(800 * 0.2 ** (min(iteration, 100) / 100) + 1e-9)
    assert plan.probabilities == pytest.approx(probabilities)
    assert not plan.warm_up


def test_ablations_and_warm_up_of_the_schedules():
    assert plan_step(step_args(rmt_no_budget_decay=True), 90).budget == 800
    assert plan_step(step_args(rmt_initial_budget=2), 100).budget == 1
    assert plan_step(step_args(rmt_no_curriculum=True), 0).probabilities is None
    args = step_args(rmt_warmup_iters=3)
    plans = [plan_step(args, iteration) for iteration in range(5)]
    assert [plan.warm_up for plan in plans] == [1, 1, 1, 0, 0]
    assert not any(plan.thought_from_text for plan in plans)
    assert {(plan.positions_per_sample, plan.group) for plan in plans} == {(4, 2)}


def test_responses_from_the_text_are_spread_over_more_positions():
    args = step_args(rmt_warmup_iters=3, rmt_warmup_thought="text")
    plans = [plan_step(args, iteration) for iteration in range(5)]
    assert [plan.thought_from_text for plan in plans] == [1, 1, 1, 0, 0]
    shapes = [(plan.positions_per_sample, plan.group) for plan in plans]
    assert shapes == [(8, 1)] * 3 + [(4, 2)] * 2
