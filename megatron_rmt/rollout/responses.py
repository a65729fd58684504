"""What rollouts generated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Responses:
    """What the rollouts of some positions generated; ``longest`` is the length of the longest.

    tokens: ``[positions, group, longest]`` int64. lengths: ``[positions, group]`` int64. drawn:
    ``[positions, group, longest]`` bool, True where the policy drew the token (a forced end of
    thought is not drawn). log_probs: like tokens, fp32, of each drawn token under the sampling
    distribution when it was drawn.
    """

    tokens: Tensor
    lengths: Tensor
    drawn: Tensor
    log_probs: Tensor

    def positions(self, first: int, limit: int) -> "Responses":
        """The responses of positions ``[first, limit)``."""
        span = slice(first, limit)
        return Responses(
            self.tokens[span], self.lengths[span], self.drawn[span], self.log_probs[span]
        )


def join_responses(parts: Sequence[Responses]) -> Responses:
    """The responses of several lists of positions, one after the other."""
    longest = max(part.tokens.shape[2] for part in parts)

    def joined(name: str) -> Tensor:
        padded = (F.pad(getattr(part, name), (0, longest - part.tokens.shape[2])) for part in parts)
        return torch.cat(list(padded))

    return Responses(
        joined("tokens"),
        torch.cat([p.lengths for p in parts]),
        joined("drawn"),
        joined("log_probs"),
    )
