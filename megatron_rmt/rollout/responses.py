"""What a rollout generated, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(slots=True)
class Rollout:
    """One response to a position. Each ``[length]``.

    tokens: int64. drawn: bool, True where the policy drew the token (a forced end of thought is not
    drawn). log_probs: fp32, of each drawn token under the sampling distribution when it was drawn,
    0 for the others.
    """

    tokens: np.ndarray
    drawn: np.ndarray
    log_probs: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def written(tokens: Sequence[int]) -> Rollout:
    """A response of which the policy drew nothing."""
    count = len(tokens)
    return Rollout(
        np.array(tokens, dtype=np.int64),
        np.zeros(count, dtype=bool),
        np.zeros(count, dtype=np.float32),
    )
