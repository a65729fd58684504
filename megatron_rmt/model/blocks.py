"""What each row of a tree sees, told by a few integers for each document and chosen position.

Segments: a document, a stem and a branch are runs of consecutive rows that are causal inside and
see all rows of their ancestors (a stem its trunk, a branch its trunk and its stem).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Rows ``[first, limit)``: a causal segment, then ``branches`` of it (their lengths in rows).

    All of them see the rows ``[trunk_first, trunk_limit)``; a branch sees the causal segment and
    itself. A document is a block without trunk and branches; the block of a chosen position is its
    stem and its branches.
    """

    first: int
    limit: int
    trunk_first: int = 0
    trunk_limit: int = 0
    branches: tuple[int, ...] = ()

    @property
    def stem_limit(self) -> int:
        """The row after the causal segment: the first row of the first branch."""
        return self.limit - sum(self.branches)

    def segments(self) -> Iterator[tuple[int, int]]:
        """(first, limit) rows of the causal segment and of each branch, in order."""
        yield self.first, self.stem_limit
        ends = itertools.accumulate(self.branches, initial=self.stem_limit)
        yield from itertools.pairwise(ends)


def position_block(
    first: int,
    trunk_first: int,
    trunk_limit: int,
    stem_length: int,
    branch_lengths: Sequence[int],
) -> Block:
    """The block of one chosen position: its stem at row ``first``, then its branches.

    A single branch goes on with the stem: what both see is one causal segment.
    """
    limit = first + stem_length + sum(branch_lengths)
    branches = tuple(branch_lengths) if len(branch_lengths) > 1 else ()
    return Block(first, limit, trunk_first, trunk_limit, branches)


# Whether row ``query`` sees row ``key``: int64 tensors that broadcast, to bool.
Sees = Callable[[Tensor, Tensor], Tensor]


def longest_path(blocks: Sequence[Block]) -> int:
    """Most rows that a row of ``blocks`` sees, itself among them."""
    return max(
        block.trunk_limit
        - block.trunk_first
        + block.stem_limit
        - block.first
        + max(block.branches, default=0)
        for block in blocks
    )


def ancestry(
    blocks: Sequence[Block], device: torch.device | None = None, window: int | None = None
) -> Sees:
    """The visibility of all rows of ``blocks``, which cover the rows from 0 on, in order.

    Row ``q`` sees row ``k`` if and only if

        k <= q < descendants[k]   or   trunk_first[q] <= k < trunk_limit[q]

    and, with a ``window``, place[q] - place[k] <= window. In the order of rows a stem is followed
    by its branches, so what descends from a row inside its block are the rows up to
    ``descendants``. Places count the rows of a path, a document's being its row numbers.
    """
    ends, segments, spans, shifts = [], [], [], []
    for block in blocks:
        _, *branches = block.segments()
        ends += [block.limit, *(limit for _, limit in branches)]
        segments += [limit - first for first, limit in block.segments()]
        # The first row of a stem follows the trunk, that of every branch the stem.
        before = block.first - block.trunk_limit if block.trunk_limit > block.trunk_first else 0
        shifts += [before, *(first - block.stem_limit + before for first, _ in branches)]
        spans.append((block.limit - block.first, block.trunk_first, block.trunk_limit))

    def of_rows(values: Sequence[int] | Tensor, rows: Sequence[int] | Tensor) -> Tensor:
        values, rows = (torch.as_tensor(x, dtype=torch.int64) for x in (values, rows))
        return values.repeat_interleave(rows).to(device)

    rows, first, limit = torch.tensor(spans, dtype=torch.int64).view(-1, 3).unbind(1)
    descendants = of_rows(ends, segments)
    trunk_first, trunk_limit = of_rows(first, rows), of_rows(limit, rows)

    def sees(query: Tensor, key: Tensor) -> Tensor:
        inside = (key <= query) & (query < descendants[key])
        return inside | ((trunk_first[query] <= key) & (key < trunk_limit[query]))

    if window is None:
        return sees
    shift = of_rows(shifts, segments)

    def sees_near(query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key) & (query - shift[query] - key + shift[key] <= window)

    return sees_near


def parents_of_rows(blocks: Sequence[Block]) -> Tensor:
    """The row before each row of ``blocks`` on its path: ``[rows]`` int64, on the CPU; -1 where
    there is none."""
    parents = torch.arange(blocks[-1].limit if blocks else 0) - 1
    for block in blocks:
        trunk = block.trunk_limit - 1 if block.trunk_limit > block.trunk_first else -1
        stem = block.stem_limit - 1 if block.stem_limit > block.first else trunk
        (first, limit), *branches = block.segments()
        if first < limit:
            parents[first] = trunk
        for first, limit in branches:
            if first < limit:
                parents[first] = stem
    return parents


def rows_or_all(rows: slice | None, blocks: Sequence[Block]) -> slice:
    """``rows``, or those of all ``blocks``."""
    return slice(0, blocks[-1].limit if blocks else 0) if rows is None else rows


def clipped(first: int, limit: int, rows: slice) -> tuple[int, int] | None:
    """What of the rows ``[first, limit)`` is among ``rows``; None if nothing is."""
    first, limit = max(first, rows.start), min(limit, rows.stop)
    return (first, limit) if first < limit else None


def keys_of_rows(blocks: Sequence[Block]) -> Tensor:
    """How many rows each row of ``blocks`` sees, itself included: ``[rows]`` int64, on the CPU."""
    ancestors, lengths = [], []
    for block in blocks:
        trunk, stem = block.trunk_limit - block.trunk_first, block.stem_limit - block.first
        ancestors += [trunk, *[trunk + stem] * len(block.branches)]
        lengths += [limit - first for first, limit in block.segments()]
    sizes = torch.tensor(lengths, dtype=torch.int64)
    # Of each segment, less the rows before it, which counting on through all of them adds.
    before = torch.tensor(ancestors, dtype=torch.int64) - (sizes.cumsum(0) - sizes)
    return before.repeat_interleave(sizes) + torch.arange(1, sum(lengths) + 1)


def _batch(rows: Tensor) -> Tensor:
    """``[rows, heads, dim]`` as a batch of one, ``[1, heads, rows, dim]``, a view."""
    return rows.transpose(0, 1)[None]
