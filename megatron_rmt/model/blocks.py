"""What each row of a tree sees, told by a few integers for each document and chosen position.

Segments: a document, a stem and a branch are runs of consecutive rows that are causal inside and
see all rows of their ancestors (a stem its trunk, a branch its trunk and its stem).
"""

import itertools
from collections.abc import Callable, Sequence
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
        branch_firsts = [*itertools.accumulate(block.branches, initial=block.stem_limit)]
        ends += [block.limit, *branch_firsts[1:]]
        segments += [block.stem_limit - block.first, *block.branches]
        # The first row of a stem follows the trunk, that of every branch the stem.
        before = block.first - block.trunk_limit if block.trunk_limit > block.trunk_first else 0
        shifts += [before, *(first - block.stem_limit + before for first in branch_firsts[:-1])]
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


def _batch(rows: Tensor) -> Tensor:
    """``[rows, heads, dim]`` as a batch of one, ``[1, heads, rows, dim]``, a view."""
    return rows.transpose(0, 1)[None]
