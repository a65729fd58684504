"""Which stored keys each row of a pass sees, as vectors on the device."""

from typing import NamedTuple

from torch import Tensor


class RowLimits(NamedTuple):
    """Each int32 ``[rows]``.

    A row sees the rows ``[first, limit)`` of the stored trunks and the first ``length`` tokens of
    tail ``tail``. Padding sees nothing: ``limit`` and ``length`` are 0.
    """

    first: Tensor
    limit: Tensor
    tail: Tensor
    length: Tensor
