"""The thinking budget, which decays over training (RMT, arXiv 2509.24375)."""

import math


def token_budget(
    iteration: int,
    train_iters: int,
    initial: int = 800,
    minimum: int = 1,
    decay: float = 0.2,
) -> int:
    """Tokens that the prompt asks for: B_t = max(minimum, floor(initial * decay^(t / T))).

    Args:
        iteration: t, from 0 to `train_iters`.
        train_iters: T, the iterations of the whole run.
        initial: B_0, the budget at t = 0.
        minimum: B_min, at least 1.
        decay: gamma, in (0, 1]: the fraction of B_0 that is left at t = T.

    Raises:
        ValueError: an argument lies outside its range.
    """
    if train_iters < 1:
        raise ValueError(f"train_iters is {train_iters}; pass at least 1")
    if not 0 <= iteration <= train_iters:
        raise ValueError(f"iteration is {iteration}; pass a number from 0 to {train_iters}")
    if minimum < 1:
        raise ValueError(f"minimum is {minimum}; pass at least 1 token")
    if initial < minimum:
        raise ValueError(f"initial is {initial}; pass at least the minimum budget, {minimum}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}; pass a number in (0, 1]")
    budget = initial * decay ** (iteration / train_iters)
    # A power that is a whole number mathematically may come out one rounding error below it.
    return max(minimum, math.floor(budget * (1 + 1e-12)))
