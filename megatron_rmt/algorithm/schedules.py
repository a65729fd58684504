"""What is decided before a step: the schedules of budget and curriculum, and the warm-up."""

from argparse import Namespace
from dataclasses import dataclass

from megatron_rmt.algorithm.budget import token_budget
from megatron_rmt.algorithm.curriculum import tier_probabilities


@dataclass(frozen=True)
class Schedule:
    """What is decided before a step: iteration (0 for the first), budget B_t, probabilities of the
    tiers (None: uniform), most positions chosen in a sample, responses to each (G), whether this is
    a step of format warm-up, and whether its thoughts are taken from the text."""

    iteration: int
    budget: int
    probabilities: tuple[float, float, float] | None
    positions_per_sample: int
    group: int
    warm_up: bool
    thought_from_text: bool


def schedule_of_step(args: Namespace, iteration: int) -> Schedule:
    """The schedules at ``iteration``; after ``--train-iters`` they stay at their end."""
    iteration_in_range = min(iteration, args.train_iters)
    budget = args.rmt_initial_budget
    if not args.rmt_no_budget_decay:
        budget = token_budget(
            iteration_in_range,
            args.train_iters,
            initial=args.rmt_initial_budget,
            minimum=args.rmt_minimum_budget,
            decay=args.rmt_budget_decay,
        )
    probabilities = None
    if not args.rmt_no_curriculum:
        probabilities = tier_probabilities(
            iteration_in_range,
            args.train_iters,
            args.rmt_curriculum_start,
            args.rmt_curriculum_end,
            tuple(args.rmt_start_probabilities),
            tuple(args.rmt_end_probabilities),
        )
    warm_up = iteration < args.rmt_warmup_iters
    from_text = warm_up and args.rmt_warmup_thought == "text"
    # Responses that are written are all alike, so one shows as much as a group: the same number of
    # responses is spread over more positions.
    positions, group = args.rmt_positions_per_sample, args.rmt_group_size
    return Schedule(
        iteration=iteration,
        budget=budget,
        probabilities=probabilities,
        positions_per_sample=positions * group if from_text else positions,
        group=1 if from_text else group,
        warm_up=warm_up,
        thought_from_text=from_text,
    )
