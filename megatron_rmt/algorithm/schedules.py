"""What is decided before a step: the schedules of budget and curriculum, and the warm-up."""

from dataclasses import dataclass

from megatron_rmt.algorithm.budget import tier_budget, token_budget
from megatron_rmt.algorithm.curriculum import TierProbabilities, tier_probabilities
from megatron_rmt.algorithm.settings import Settings


@dataclass(frozen=True)
class Schedule:
    """What is decided before a step: iteration (0 for the first), progress t/T, budget B_t, the
    budgets of the easy, medium and hard tier, probabilities of the tiers (None: uniform), most
    positions chosen in a sample, responses to each (G), whether this is a step of format warm-up,
    and whether its thoughts are taken from the text."""

    iteration: int
    progress: float
    budget: int
    tier_budgets: tuple[int, int, int]
    probabilities: TierProbabilities | None
    positions_per_sample: int
    group: int
    warm_up: bool
    thought_from_text: bool


def schedule_of_step(settings: Settings, iteration: int, train_iters: int) -> Schedule:
    """The schedules at ``iteration`` of ``train_iters``; after the last they stay at their end."""
    iteration_in_range = min(iteration, train_iters)
    budget = settings.initial_budget
    if not settings.no_budget_decay:
        budget = token_budget(
            iteration_in_range,
            train_iters,
            settings.initial_budget,
            settings.minimum_budget,
            settings.budget_decay,
            settings.budget_exponent,
        )
    probabilities = None
    if not settings.no_curriculum:
        probabilities = tier_probabilities(
            iteration_in_range,
            train_iters,
            settings.curriculum_start,
            settings.curriculum_end,
            settings.start_probabilities,
            settings.end_probabilities,
        )
    warm_up = iteration < settings.warmup_iters
    from_text = warm_up and settings.warmup_thought == "text"
    # Responses that are written are all alike, so one shows as much as a group: the same number of
    # responses is spread over more positions.
    positions, group = settings.positions_per_sample, settings.group_size
    return Schedule(
        iteration=iteration,
        progress=iteration_in_range / train_iters,
        budget=budget,
        tier_budgets=tier_budgets(settings, budget),
        probabilities=probabilities,
        positions_per_sample=positions * group if from_text else positions,
        group=1 if from_text else group,
        warm_up=warm_up,
        thought_from_text=from_text,
    )


def tier_budgets(settings: Settings, budget: int) -> tuple[int, int, int]:
    """Tokens of thought asked for in the easy, medium and hard tier where B_t is ``budget``."""
    if settings.tier_budgets is None:
        return (budget,) * 3
    easy, medium, hard = (
        tier_budget(budget, part, settings.minimum_budget) for part in settings.tier_budgets
    )
    return easy, medium, hard


def longest_budgets(settings: Settings) -> tuple[int, int, int]:
    """The tiers' budgets where they are largest: B_t never rises."""
    return tier_budgets(settings, settings.initial_budget)
