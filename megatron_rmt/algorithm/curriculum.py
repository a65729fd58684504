"""Which positions of a document are reasoned about (RMT's curriculum, arXiv 2509.24375).

Positions are sorted into tiers by the entropy of the next token. The probabilities of the tiers
move from easy to hard over training; a position is drawn by drawing a tier, then a position in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rmt.algorithm.rng import CURRICULUM_STREAM, uniforms

EASY, MEDIUM, HARD = 0, 1, 2

TierProbabilities = tuple[float, float, float]


def tiers(entropies: Tensor, thresholds: Sequence[float], ceiling: float | None = None) -> Tensor:
    """The disjoint tier of each position.

    Args:
        entropies: nats, [n] (any shape).
        thresholds: lower ends of the easy, medium and hard tier, ascending.
        ceiling: upper end of the hard tier, nats; None for none.

    Returns:
        int64 of the same shape: EASY, MEDIUM or HARD, and -1 below the first threshold and above
        the ceiling (never chosen). NaN gives -1.
    """
    easy, medium, hard = (entropies >= threshold for threshold in thresholds)
    found = easy.long() + medium.long() + hard.long() - 1
    return found if ceiling is None else found.masked_fill(entropies > ceiling, -1)


def tier_probabilities(
    iteration: int,
    train_iters: int,
    start: float,
    end: float,
    start_probabilities: TierProbabilities,
    end_probabilities: TierProbabilities,
) -> TierProbabilities:
    """Probabilities of the easy, medium and hard tier at one iteration.

    Constant up to t1 = start * T, linear between, constant from t2 = end * T on. With start equal
    to end it is a step, and the iteration at the step has the end's probabilities.

    Args:
        iteration: t, 0 or more.
        train_iters: T.
        start, end: fractions of T, 0 <= start <= end <= 1.
        start_probabilities, end_probabilities: of easy, medium, hard; each sums to 1.
    """
    fraction = iteration / train_iters
    if fraction >= end:
        return tuple(end_probabilities)
    if fraction <= start:
        return tuple(start_probabilities)
    weight = (fraction - start) / (end - start)
    return tuple(
        (1 - weight) * p + weight * q
        for p, q in zip(start_probabilities, end_probabilities, strict=True)
    )


@dataclass(frozen=True)
class Candidates:
    """What a selection sees of one sample.

    entropies: fp32 [n] in nats. tiers: int64 [n], -1 where a position may not be chosen.
    probabilities: of easy, medium and hard at this step; None without a curriculum. count: most
    positions wanted, a reserve included. progress: t/T, from 0 to 1. seed, iteration, sample: key
    of the random numbers, the latter the index of the sample in the whole run. trunk: the text
    before the token that a position predicts, from the beginning of its document.
    """

    entropies: Tensor
    tiers: Tensor
    probabilities: TierProbabilities | None
    count: int
    progress: float
    seed: int
    iteration: int
    sample: int
    trunk: Callable[[int], bytes]

    def draws(self, count: int) -> list[list[float]]:
        """``count`` pairs of uniform numbers in [0, 1), a pure function of the key."""
        return uniforms(
            self.seed,
            self.iteration,
            self.sample,
            0,
            torch.arange(2).unsqueeze(1),
            torch.arange(count),
            stream=CURRICULUM_STREAM,
        ).T.tolist()


Selection = Callable[[Candidates], list[int]]


def with_reserve(selection: Selection) -> Selection:
    """Marks a selection, as a decorator: it returns positions in the order in which it wants them,
    more of them than are trained; see ``first_that_differ``."""
    selection.has_reserve = True
    return selection


def has_reserve(selection: Selection) -> bool:
    """Whether ``selection`` is marked ``with_reserve``."""
    return getattr(selection, "has_reserve", False)


def first_that_differ(differ: Sequence[bool], count: int) -> list[int]:
    """Which of some positions are trained, once their rewards are known; ascending.

    DAPO's dynamic sampling (arXiv 2503.14476) from what was drawn at once: a group whose rewards do
    not differ teaches nothing, so another takes its place; where there is none, it stays.

    Args:
        differ: whether the rewards of each group differ, in the order of drawing.
        count: most positions to be trained.
    """
    return sorted(sorted(range(len(differ)), key=lambda place: not differ[place])[:count])


@with_reserve
def draw_by_tier(of: Candidates) -> list[int]:
    """Draw up to `of.count` positions without replacement (RMT's curriculum).

    Each draw takes a tier by the probabilities, renormalised over the tiers that still hold
    positions (an empty tier hands its mass to the others in proportion; if all the mass lies on
    empty tiers, the others are equally probable), then a position uniformly inside it. Without
    probabilities all positions are one tier (the paper's ablation).

    Returns:
        Indices of positions as they are drawn; fewer where there are fewer. The first of them do
        not depend on `of.count`.
    """
    probabilities = of.probabilities
    if probabilities is None:
        pools = [torch.nonzero(of.tiers >= 0).flatten().tolist()]
        probabilities = (1.0,)
    else:
        pools = [torch.nonzero(of.tiers == tier).flatten().tolist() for tier in range(3)]
    chosen = []
    # One number for the tier, one for the position inside it.
    for for_tier, for_position in of.draws(min(of.count, sum(map(len, pools)))):
        masses = [p if pool else 0.0 for p, pool in zip(probabilities, pools, strict=True)]
        if sum(masses) == 0:
            masses = [1.0 if pool else 0.0 for pool in pools]
        pool = pools[_draw(masses, for_tier)]
        chosen.append(pool.pop(int(for_position * len(pool))))
    return chosen


def choose_by_tier(of: Candidates) -> list[int]:
    """The positions of ``draw_by_tier``, ascending."""
    return sorted(draw_by_tier(of))


# By name of --rmt-select.
SELECTIONS: dict[str, Selection] = {"tiers": choose_by_tier, "gain-variance": draw_by_tier}


def _draw(masses: Sequence[float], uniform: float) -> int:
    """Index drawn with probability proportional to its mass; never one of mass 0."""
    target = uniform * sum(masses)
    drawn = -1
    for index, mass in enumerate(masses):
        if mass > 0:
            drawn = index
            if target < mass:
                break
            target -= mass
    return drawn
