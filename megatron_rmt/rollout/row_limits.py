"""Which stored keys each row of a pass sees, as vectors on the device."""

from typing import NamedTuple

import torch
from torch import Tensor


class RowLimits(NamedTuple):
    """Each int32 ``[rows]``.

    A row sees the rows ``[first, limit)`` of the stored trunks and the tokens ``[start, length)``
    of tail ``tail``, the last of which is its own. Padding sees nothing: ``limit`` and ``length``
    are 0.
    """

    first: Tensor
    limit: Tensor
    tail: Tensor
    length: Tensor
    start: Tensor

    @classmethod
    def of(cls, first: Tensor, limit: Tensor, tail: Tensor, length: Tensor) -> "RowLimits":
        """Rows that see all of their tails up to themselves; whole numbers of any dtype."""
        own = length.int()
        return cls(first.int(), limit.int(), tail.int(), own, torch.zeros_like(own))

    def within(self, window: int | None) -> "RowLimits":
        """What of it lies in a layer's ``window`` (``LayerAttention``)."""
        if window is None:
            return self
        # Of the tail; below 0 it lies that far before the end of the trunk.
        start = self.length - 1 - window
        return self._replace(
            first=torch.maximum(self.first, self.limit + start.clamp(max=0)),
            limit=self.limit * (start < 0),
            start=start.clamp(min=0),
        )
