"""Mamba-2's state-space layer in plain PyTorch, over sequences that branch (arXiv 2405.21060).

What the layer mixes along a sequence, between its two linear layers: a short causal convolution of
each channel, from which x, B and C come, and then in each head, with its step size dt,

    h = exp(dt A) h_before + dt x B^T,    y = h C + D x,

where h, the state, is all that a row knows of the rows before it. A sequence that branches is told
by the parent of each row; a row is computed once, whatever comes after it.

The scan goes by chunks, runs of rows that follow each other: inside them by products of matrices,
all at once, then from chunk to chunk by their states. A chunk ends where its sequence branches, so
that each begins with the state at the end of another one.

Written for the CPU, where the kernels of ``mamba_ssm`` do not run, in fp32 or wider, for torch's
autograd; nothing in it asks what device it is on.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Most rows of a chunk: its products take time by their square, and each chunk has a state.
CHUNK_ROWS = 64


class State(NamedTuple):
    """What rows know of those before them, at several places of sequences.

    inputs: ``[places, width - 1, channels]``, the last inputs of the convolution, oldest first;
    zeros before a sequence. state: ``[places, heads, head dim, state dim]``, fp32 or wider.
    """

    inputs: Tensor
    state: Tensor

    def at(self, places: Tensor | slice) -> "State":
        """Those of ``places``."""
        return State(self.inputs[places], self.state[places])


@dataclass(frozen=True)
class StateSpace:
    """A layer's parameters, this tensor-parallel rank's part of them.

    number: of the layer in the whole model, from 1. kernel: ``[channels, width]`` of the
    convolution, whose channels are x of all heads, B and C of all groups. bias: ``[channels]``.
    dt_bias, a_log, skip: ``[heads]``; -exp(a_log) is A, skip is D, which may be of each channel of
    x, ``[heads * head dim]``. groups: heads of one share B and C. state_dim: of B and C.
    """

    number: int
    kernel: Tensor
    bias: Tensor
    dt_bias: Tensor
    a_log: Tensor
    skip: Tensor
    groups: int
    state_dim: int

    @classmethod
    def of(cls, mixer: Any) -> "StateSpace":
        """That of Megatron's ``MambaMixer``."""
        return cls(
            number=mixer.layer_number,
            kernel=mixer.conv1d_weight[:, 0],
            bias=mixer.conv1d_bias,
            dt_bias=mixer.dt_bias,
            a_log=mixer.A_log,
            skip=mixer.D,
            groups=mixer.ngroups_local_tp,
            state_dim=mixer.d_state,
        )

    @property
    def heads(self) -> int:
        return len(self.dt_bias)

    @property
    def head_dim(self) -> int:
        return (len(self.kernel) - 2 * self.groups * self.state_dim) // self.heads

    @property
    def width(self) -> int:
        """Of the convolution: inputs that a row sees, itself among them."""
        return self.kernel.shape[1]

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gate, the inputs of the convolution, and the step sizes of all heads before their
        bias, in the last dimension of what the first linear layer makes."""
        return projected.split([self.heads * self.head_dim, len(self.kernel), self.heads], dim=-1)

    def nothing_before(self) -> State:
        """The state at the beginning of a sequence."""
        kernel = self.kernel
        shape = (1, self.heads, self.head_dim, self.state_dim)
        state = torch.zeros(shape, dtype=_wide(kernel.dtype), device=kernel.device)
        return State(kernel.new_zeros(1, self.width - 1, len(kernel)), state)


@dataclass(frozen=True)
class Lineage:
    """In which order rows are scanned.

    chunks: ``[chunks, places]`` int64, the rows of each, padded with the number of rows; ordered by
    level: those of the first begin with a given state, those of each other at the end of one of the
    level before. levels: chunks of each. before: ``[chunks]`` int64, which one of the level before,
    or which given state. last: ``[chunks]`` int64, the last row of each. places: ``[rows]`` int64,
    of each row among all places of all chunks. ancestors: ``[rows, width]`` int64, a row, its
    parent, and so on, among the rows and, behind these, the inputs of the given states.
    """

    chunks: Tensor
    levels: tuple[int, ...]
    before: Tensor
    last: Tensor
    places: Tensor
    ancestors: Tensor

    @classmethod
    def of(cls, parents: Tensor, width: int) -> "Lineage":
        """That of rows with ``parents`` ``[rows]`` int64, on the CPU: the row before each in its
        sequence, always an earlier one, or -1 - i where that begins with given state i."""
        count = len(parents)
        rows = torch.arange(count)
        follows = parents == rows - 1
        follows[:1] = False
        branches = torch.zeros(count, dtype=torch.bool)
        branches[parents[~follows & (parents >= 0)]] = True
        begins = ~follows
        begins[1:] |= branches[:-1]
        # Runs of rows that follow each other, and the chunks that they are cut into.
        run = begins.long().cumsum(0) - 1
        place = rows - begins.nonzero()[:, 0][run] if count else rows
        begins = place % CHUNK_ROWS == 0
        chunk = begins.long().cumsum(0) - 1
        first = begins.nonzero()[:, 0]
        place = rows - first[chunk] if count else rows

        order, levels, before = _by_level(
            [(int(chunk[p]) if p >= 0 else p) for p in parents[first].tolist()]
        )
        of_chunk = torch.empty_like(order)
        of_chunk[order] = torch.arange(len(order))
        length = int(place.max()) + 1 if count else 1
        places = of_chunk[chunk] * length + place
        chunks = torch.full((len(order) * length,), count)
        chunks[places] = rows
        ends = torch.bincount(chunk, minlength=len(first)) + first - 1
        return cls(
            chunks=chunks.view(-1, length),
            levels=levels,
            before=before,
            last=ends[order],
            places=places,
            ancestors=_ancestors(parents, width),
        )

    def to(self, device: torch.device) -> "Lineage":
        """The same on ``device``."""
        tensors = (self.chunks, self.before, self.last, self.places, self.ancestors)
        chunks, before, last, places, ancestors = (own.to(device) for own in tensors)
        return Lineage(chunks, self.levels, before, last, places, ancestors)

    def chunk_of(self, rows: Tensor | slice) -> Tensor:
        """The chunks, among all, that ``rows`` are in."""
        return self.places[rows] // self.chunks.shape[1]

    def chunks_before(self) -> Tensor:
        """``[chunks]`` int64: at the end of which one each begins, -1 with a given state."""
        starts = [0, *itertools.accumulate(self.levels)]
        levels = self.before.split(self.levels)
        found = [torch.full_like(own, -1) for own in levels[:1]]
        found += [own + start for own, start in zip(levels[1:], starts, strict=False)]
        return torch.cat([self.before[:0], *found])


def _by_level(parents: Sequence[int]) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """Of chunks, each with an earlier one as its parent or -1 - i for given state i: their order by
    level, how many are on each level, and, in that order, the places of their parents on theirs."""
    level: list[int] = []
    place: list[int] = []
    sizes: list[int] = []
    for parent in parents:
        own = level[parent] + 1 if parent >= 0 else 0
        if own == len(sizes):
            sizes.append(0)
        level.append(own)
        place.append(sizes[own])
        sizes[own] += 1
    before = [place[parent] if parent >= 0 else -1 - parent for parent in parents]
    order = torch.tensor(level, dtype=torch.int64).argsort(stable=True)
    return order, tuple(sizes), torch.tensor(before, dtype=torch.int64)[order]


def _ancestors(parents: Tensor, width: int) -> Tensor:
    count, inputs = len(parents), width - 1
    starts = max(0, -int(parents.min())) if count else 0
    # The newest input of a given state comes right before the first row that begins with it.
    newest = count + (-1 - parents) * inputs + inputs - 1
    of_starts = count + torch.arange(starts * inputs) - 1
    before = torch.cat([torch.where(parents >= 0, parents, newest), of_starts])
    found = [torch.arange(count)]
    for _ in range(inputs):
        found.append(before[found[-1]])
    return torch.stack(found, dim=1)


def straight(sequences: int, length: int) -> Tensor:
    """The ``parents`` of several sequences, one after the other, none of which branches."""
    parents = torch.arange(sequences * length) - 1
    parents[::length] = -1
    return parents


def mix(
    space: StateSpace,
    gate: Tensor,
    inputs: Tensor,
    steps: Tensor,
    lineage: Lineage,
    start: State,
) -> tuple[Tensor, State]:
    """What a state-space layer makes of ``inputs``, before its norm, and the states that this
    leaves.

    gate, inputs, steps: as ``StateSpace.split`` returns them, ``[rows, ...]``. start: the states
    that the sequences begin with. Returns ``[rows, heads * head dim]`` in the dtype of the inputs,
    and the state at the end of each chunk, differentiable in everything.
    """
    wide = _wide(inputs.dtype)
    held = torch.cat([inputs, start.inputs.flatten(0, 1)])
    kernel, convolved = space.kernel.to(wide), space.bias.to(wide)
    for age, rows in enumerate(lineage.ancestors.unbind(1)):
        convolved = convolved + kernel[:, -1 - age] * held.index_select(0, rows).to(wide)
    # As the kernels, which hand it on in the dtype that it came in.
    active = F.silu(convolved).to(inputs.dtype).to(wide)
    shared = space.groups * space.state_dim
    x, b, c = active.split([active.shape[1] - 2 * shared, shared, shared], dim=-1)
    x = x.unflatten(1, (space.groups, -1, space.head_dim))
    b, c = (own.unflatten(1, (space.groups, space.state_dim)) for own in (b, c))
    dt = F.softplus(steps.to(wide) + space.dt_bias.to(wide)).unflatten(1, (space.groups, -1))
    rate = -space.a_log.to(wide).exp().unflatten(0, (space.groups, -1))
    state = start.state.unflatten(1, (space.groups, -1))
    y, states = _scan(x, dt, rate, b, c, lineage, state)
    y = y + space.skip.to(wide).view(space.groups, y.shape[2], -1) * x
    y = y.flatten(1) * F.silu(gate.to(wide))
    newest = lineage.ancestors[lineage.last, : space.width - 1].flip(1)
    left = held.index_select(0, newest.flatten()).unflatten(0, newest.shape)
    return y.to(inputs.dtype), State(left, states.flatten(1, 2))


def _scan(
    x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor, lineage: Lineage, start: Tensor
) -> tuple[Tensor, Tensor]:
    """y without D x ``[rows, groups, heads, dim]``, and the states at the ends of the chunks
    ``[chunks, groups, heads, dim, state dim]``.

    x: ``[rows, groups, heads of a group, dim]``, dt: ``[rows, groups, heads]``, rate, which is A:
    ``[groups, heads]``, b, c: ``[rows, groups, state dim]``, start: given states, like the states.
    """

    def by_chunk(values: Tensor) -> Tensor:
        # Padding has a step of 0, which keeps a state as it is.
        padded = torch.cat([values, values.new_zeros(1, *values.shape[1:])])
        return padded.index_select(0, lineage.chunks.flatten()).unflatten(0, lineage.chunks.shape)

    x, dt, b, c = map(by_chunk, (x, dt, b, c))
    # Logarithms of what is left of a state: [chunks, places, groups, heads].
    left = (dt * rate).cumsum(1)
    places = torch.arange(left.shape[1], device=left.device)
    unseen = places > places[:, None]
    decay = (left[:, :, None] - left[:, None]).masked_fill(unseen[..., None, None], -torch.inf)
    weights = torch.einsum("cign,cjgn->cijg", c, b)[..., None] * decay.exp() * dt[:, None]
    y = torch.einsum("cijgh,cjghp->cighp", weights, x)
    # What each chunk adds to its state, and what it leaves of the one that it begins with.
    last = left[:, -1:]
    added = torch.einsum("cjgn,cjghp->cghpn", b, x * (dt * (last - left).exp())[..., None])
    kept = last[:, 0].exp()[..., None, None]
    states, begun = [start], []
    for own, adds, keeps in zip(
        *(t.split(lineage.levels) for t in (lineage.before, added, kept)), strict=True
    ):
        begun.append(states[-1].index_select(0, own))
        states.append(begun[-1] * keeps + adds)
    none = added[:0]
    begun, ends = torch.cat([none, *begun]), torch.cat([none, *states[1:]])
    y = y + torch.einsum("cign,cghpn->cighp", c, begun) * left.exp()[..., None]
    return y.flatten(0, 1).index_select(0, lineage.places), ends


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
