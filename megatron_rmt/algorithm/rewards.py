"""The reward of a response: r = (1 - w) * match + w * r_len (RMT, arXiv 2509.24375)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def length_reward(
    length: int | float | Tensor, budget: int | float | Tensor, maximum: float = 1.0
) -> float | Tensor:
    """Triangular reward of a thought's length l against its budget B (RMT's r_len).

    maximum * l / B on [0, B], maximum * (2 - l / B) on (B, 2B], 0 beyond.

    Args:
        length: tokens of the thought; a number, or a tensor of any shape.
        budget: tokens asked for, above 0; a number, or a tensor that broadcasts with `length`.
        maximum: the reward at l = B.

    Returns:
        A float for numbers; otherwise a floating-point tensor of the broadcast shape (float32 for
        integer tensors).

    Raises:
        ValueError: a plain budget is not above 0 or a plain length is negative.
    """
    if not isinstance(budget, Tensor) and not budget > 0:
        raise ValueError(f"budget is {budget}; pass a number of tokens above 0")
    if not isinstance(length, Tensor) and not length >= 0:
        raise ValueError(f"length is {length}; pass a number of tokens of 0 or more")
    ratio = length / budget
    if isinstance(ratio, Tensor):
        return maximum * torch.minimum(ratio, 2 - ratio).clamp(min=0)
    return maximum * max(0.0, min(ratio, 2 - ratio))


def prefix_match_reward(prediction: bytes, continuation: bytes, boundaries: Sequence[int]) -> float:
    """1.0 if the prediction is a byte prefix of the truth that ends on a token boundary, else 0.0.

    RPT's prefix matching reward (arXiv 2506.08007): it does not matter how the model's tokenizer
    would cut the prediction, and a prediction of several right tokens counts as well.

    Args:
        prediction: bytes of the predicted text; empty never matches.
        continuation: bytes of the true text from the predicted position on.
        boundaries: cumulative byte lengths of the continuation's tokens: for tokens b"th", b"e"
            it is (2, 3).
    """
    matches = (
        len(prediction) > 0
        and continuation.startswith(prediction)
        and len(prediction) in boundaries
    )
    return 1.0 if matches else 0.0


def total_reward(match: Tensor, length_reward: Tensor, weight: float) -> Tensor:
    """(1 - weight) * match + weight * length_reward, elementwise.

    Args:
        match, length_reward: tensors of one shape.
        weight: w of the paper, in [0, 1].

    Raises:
        ValueError: weight lies outside [0, 1].
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}; pass a number in [0, 1]")
    return (1 - weight) * match + weight * length_reward
