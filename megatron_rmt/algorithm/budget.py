"""The thinking budget, which decays over training (RMT, arXiv 2509.24375), and its tiers'."""

import math


def token_budget(
    iteration: int,
    train_iters: int,
    initial: int,
    minimum: int,
    decay: float,
    exponent: float = 1.0,
) -> int:
    """Tokens that the prompt asks for: B_t = max(minimum, floor(initial * decay^((t / T)^k))).

    Args:
        iteration: t, from 0 to `train_iters`.
        train_iters: T, the iterations of the whole run.
        initial: B_0, the budget at t = 0.
        minimum: B_min, at least 1.
        decay: gamma, in (0, 1]: the fraction of B_0 that is left at t = T.
        exponent: k, 1 in the paper: above 1 the budget falls late, below 1 early.
    """
    budget = initial * decay ** ((iteration / train_iters) ** exponent)
    return _whole(budget, minimum)


def tier_budget(budget: int, part: float, minimum: int) -> int:
    """Tokens asked for in a tier: max(minimum, floor(part * budget)).

    Args:
        budget: B_t.
        part: above 0; 1 is B_t itself.
        minimum: B_min, at least 1.
    """
    return _whole(part * budget, minimum)


def _whole(tokens: float, minimum: int) -> int:
    # What is a whole number mathematically may come out one rounding error below it.
    return max(minimum, math.floor(tokens * (1 + 1e-12)))
