"""Which positions of a document are reasoned about (RMT's curriculum, arXiv 2509.24375).

Positions are sorted into tiers by the entropy of the next token. The probabilities of the tiers
move from easy to hard over training; a position is drawn by drawing a tier, then a position in it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rmt.algorithm.rng import CURRICULUM_STREAM, uniforms

EASY, MEDIUM, HARD = 0, 1, 2
# Nats (RPT, arXiv 2506.08007). Easy is [0.5, 1.0), medium [1.0, 1.5), hard [1.5, inf).
THRESHOLDS = (0.5, 1.0, 1.5)

TierProbabilities = tuple[float, float, float]


def tiers(entropies: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """The disjoint tier of each position.

    Args:
        entropies: nats, [n] (any shape).
        thresholds: lower ends of the easy, medium and hard tier, ascending.

    Returns:
        int64 of the same shape: EASY, MEDIUM or HARD, and -1 below the first threshold (never
        chosen). NaN gives -1.

    Raises:
        ValueError: thresholds is not three ascending numbers.
    """
    if len(thresholds) != 3 or not thresholds[0] < thresholds[1] < thresholds[2]:
        raise ValueError(f"thresholds is {tuple(thresholds)}; pass three ascending numbers")
    easy, medium, hard = (entropies >= threshold for threshold in thresholds)
    return easy.long() + medium.long() + hard.long() - 1


def _check_probabilities(name: str, probabilities: Sequence[float]) -> None:
    if (
        len(probabilities) != 3
        or not all(p >= 0 for p in probabilities)
        or abs(sum(probabilities) - 1) > 1e-6
    ):
        raise ValueError(
            f"{name} is {tuple(probabilities)}; pass three numbers of 0 or more whose sum is 1"
        )


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

    Raises:
        ValueError: an argument lies outside its range.
    """
    if train_iters < 1:
        raise ValueError(f"train_iters is {train_iters}; pass at least 1")
    if iteration < 0:
        raise ValueError(f"iteration is {iteration}; pass 0 or more")
    if not 0 <= start <= end <= 1:
        raise ValueError(f"start is {start} and end is {end}; pass 0 <= start <= end <= 1")
    _check_probabilities("start_probabilities", start_probabilities)
    _check_probabilities("end_probabilities", end_probabilities)
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


def choose_positions(
    tier_of_position: Tensor,
    probabilities: TierProbabilities | None,
    count: int,
    *,
    seed: int,
    iteration: int,
    sample: int,
) -> Tensor:
    """Draw up to `count` positions of one document, without replacement.

    Each draw takes a tier by `probabilities`, renormalised over the tiers that still hold
    positions (an empty tier hands its mass to the others in proportion; if all the mass lies on
    empty tiers, the others are equally probable), then a position uniformly inside it. The result
    is a pure function of the arguments.

    Args:
        tier_of_position: int64 [n], the tier of each position, -1 where it is not eligible.
        probabilities: of easy, medium, hard; None draws uniformly over all eligible positions
            (the paper's ablation without curriculum).
        count: positions wanted, 0 or more.
        seed, iteration, sample: key of the random numbers; `sample` is the global sample index.

    Returns:
        int64 [min(count, eligible)] on the CPU, ascending.

    Raises:
        ValueError: wrong shape, an unknown tier, bad probabilities or a negative count.
    """
    if tier_of_position.dim() != 1:
        raise ValueError(f"tier_of_position has shape {tuple(tier_of_position.shape)}; pass [n]")
    if count < 0:
        raise ValueError(f"count is {count}; pass 0 or more")
    tier_of_position = tier_of_position.cpu()
    if bool(((tier_of_position < -1) | (tier_of_position > HARD)).any()):
        raise ValueError("tier_of_position holds a value outside -1, 0, 1, 2; use curriculum.tiers")
    if probabilities is None:
        pools = [torch.nonzero(tier_of_position >= 0).flatten().tolist()]
        probabilities = (1.0,)
    else:
        _check_probabilities("probabilities", probabilities)
        pools = [torch.nonzero(tier_of_position == t).flatten().tolist() for t in range(3)]

    count = min(count, sum(map(len, pools)))
    # One pair of numbers a draw: row 0 for the tier, row 1 for the position inside it.
    pairs = uniforms(
        seed,
        iteration,
        sample,
        0,
        torch.arange(2).unsqueeze(1),
        torch.arange(count),
        stream=CURRICULUM_STREAM,
    ).T.tolist()
    chosen = []
    for for_tier, for_position in pairs:
        masses = [p if pool else 0.0 for p, pool in zip(probabilities, pools, strict=True)]
        if sum(masses) == 0:
            masses = [1.0 if pool else 0.0 for pool in pools]
        pool = pools[_draw(masses, for_tier)]
        chosen.append(pool.pop(int(for_position * len(pool))))
    return torch.tensor(sorted(chosen), dtype=torch.int64)


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
