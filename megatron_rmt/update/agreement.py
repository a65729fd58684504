"""What all ranks must agree on before a step is taken: whether to take it, and what they share.

Each rank hands over a few whole numbers. One all-gather brings them to every rank, so that all of
them come to the same end: all go on, or all raise the same.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_rmt.rollout.generate import StoppedError


class NotFiniteError(ValueError):
    """Numbers of a step are not finite. position: index, if known, of the position they are of."""

    def __init__(self, text: str, position: int | None = None) -> None:
        super().__init__(text)
        self.position = position


class RanksDifferError(RuntimeError):
    """Ranks hold different copies of what they must share."""


@dataclass(frozen=True)
class Copy:
    """Something of which several ranks hold a copy.

    what: in words. value: a whole number, or 0-d int64 on the device, that equal copies share.
    first_rank: the lowest rank of those that hold one. parts: a number for each part of it, asked
    for where copies differ.
    """

    what: str
    value: int | Tensor
    first_rank: int
    parts: Callable[[], dict[str, float]] | None = None


def first_rank(group: ProcessGroup) -> int:
    """The lowest rank of ``group``, which names it."""
    return min(dist.get_process_group_ranks(group))


def digest(*values: object) -> int:
    """A whole number of 56 bits; ``bytes`` count as they are, all else by ``repr``."""
    found = hashlib.sha256()
    for value in values:
        found.update(value if isinstance(value, bytes) else f"{value!r};".encode())
    return int.from_bytes(found.digest()[:7], "little")


def agree(
    copies: Sequence[Copy],
    device: torch.device,
    *,
    error: Exception | None = None,
    stop: bool = False,
) -> None:
    """Go on if no rank has an ``error``, all ``copies`` are equal and nobody wants to ``stop``.

    Collective over all ranks, which have the same kinds of copies; waits for the device once.

    Raises:
        Exception: the ``error`` of the lowest rank that has one, on every rank.
        RanksDifferError: copies differ. Names the ranks and what differs.
        StoppedError: a rank wants to stop.
    """
    known = torch.tensor([error is not None, stop, *(copy.first_rank for copy in copies)])
    values = [torch.as_tensor(copy.value, device=device) for copy in copies]
    own = torch.cat([known.long().to(device), *(value.long()[None] for value in values)])
    table = own[None]
    if dist.get_world_size() > 1:
        table = own.new_empty(dist.get_world_size() * len(own))
        dist.all_gather_into_tensor(table, own)
        table = table.view(-1, len(own))
    errors, stops, *columns = table.T.tolist()
    if any(errors):
        raise next(found for found in _of_all_ranks(error) if found is not None)
    count = len(copies)
    for copy, groups, found in zip(copies, columns[:count], columns[count:], strict=True):
        sides = _sides(groups, found)
        if sides:
            raise RanksDifferError(_difference(copy, sides))
    if any(stops):
        raise StoppedError


def _sides(groups: Sequence[int], values: Sequence[int]) -> list[list[int]]:
    """Of the first group whose ranks have different ``values``: the ranks, by value; or nothing."""
    if len(set(values)) == 1:
        return []
    by_group: dict[int, dict[int, list[int]]] = {}
    for rank, (group, value) in enumerate(zip(groups, values, strict=True)):
        by_group.setdefault(group, {}).setdefault(value, []).append(rank)
    return next(([*sides.values()] for sides in by_group.values() if len(sides) > 1), [])


def _difference(copy: Copy, sides: list[list[int]]) -> str:
    """One sentence on a copy that differs; collective over all ranks where it has parts."""
    ranks = " against ".join(", ".join(map(str, side)) for side in sides)
    where = ""
    if copy.parts is not None:
        parts = _of_all_ranks(copy.parts())
        one, other = (parts[side[0]] for side in sides[:2])
        names = [name for name in one if one[name] != other.get(name)]
        where = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    return (
        f"ranks differ in {copy.what}{where}: {ranks}; no step was taken: restart from the last "
        "checkpoint, which all ranks must load, and look at the hardware of the rank that stands "
        "apart if it happens again."
    )


def _of_all_ranks[T](value: T) -> list[T]:
    found: list[T] = [value] * dist.get_world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found
