"""States of state-space layers while rollouts are generated, stored for one step.

A rollout reads no keys of a trunk there, but starts from the state that the trunk has at its
position. Where that will be is not known when the trunk is read, as its entropies decide; so the
states at the ends of the trunk's chunks are stored, and what its rows feed into the layers, from
which the few rows between a chunk's beginning and a position are scanned again.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.ssm.mamba_mixer import MambaMixer
from torch import Tensor

from megatron_rmt.cpu.state_space import CHUNK_ROWS, Lineage, State, StateSpace, mix


class TrunkStates:
    """Of the trunks of one rank, per layer.

    Inputs of the convolution ``[trunk tokens, channels]`` and step sizes ``[trunk tokens, heads]``
    of all rows, and states at the ends of chunks.
    """

    def __init__(self, trunk_tokens: int) -> None:
        # Of each row's chunk, in all layers: its first row, and among the states of a layer the one
        # that it begins with; the first of these is that of a document's beginning.
        self._first = torch.zeros(trunk_tokens, dtype=torch.int64)
        self._before = torch.zeros(trunk_tokens, dtype=torch.int64)
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._states: dict[int, list[State]] = {}

    def write(
        self,
        space: StateSpace,
        first: int,
        inputs: Tensor,
        steps: Tensor,
        lineage: Lineage,
        ends: State,
    ) -> None:
        """Store what a micro-batch's trunk, whose rows are from ``first`` on, feeds into a layer,
        and the states ``ends`` that ``mix`` finds."""
        own = slice(first, first + len(inputs))
        if space.number not in self._rows:
            count = len(self._first)
            self._rows[space.number] = tuple(
                values.new_empty(count, values.shape[1]) for values in (inputs, steps)
            )
            self._states[space.number] = [space.nothing_before()]
        for stored, new in zip(self._rows[space.number], (inputs, steps), strict=True):
            stored[own] = new
        states = self._states[space.number]
        held = sum(len(state.state) for state in states)
        chunk, before = lineage.chunk_of(slice(None)), lineage.chunks_before()
        self._first[own] = first + lineage.chunks[chunk, 0].cpu()
        self._before[own] = torch.where(before < 0, 0, held + before)[chunk].cpu()
        states.append(ends)

    def states(self, layer: int) -> State:
        """All that are stored of a layer."""
        held = self._states[layer]
        if len(held) > 1:
            self._states[layer] = held = [State(*map(torch.cat, zip(*held, strict=True)))]
        return held[0]

    def rows(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and step sizes of ``rows``."""
        inputs, steps = self._rows[layer]
        return inputs[rows], steps[rows]

    def to_scan_again(self, last: int) -> tuple[range, int]:
        """The rows of the chunk of row ``last``, up to it, and which state they begin with."""
        return range(int(self._first[last]), last + 1), int(self._before[last])


@dataclass(frozen=True)
class StemScan:
    """How the stems of several positions go on from the trunk, the same in all layers.

    again: ``[rows]`` int64, trunk rows that are scanned again, of all positions. start:
    ``[positions]`` int64, the stored states that those begin with. lineage: of these rows and,
    behind them, of the stems, one after the other. ends: ``[positions]`` int64, the chunks that the
    stems end with.
    """

    again: Tensor
    start: Tensor
    lineage: Lineage
    ends: Tensor

    @classmethod
    def of(
        cls, states: TrunkStates, last_rows: Sequence[int], length: int, space: StateSpace
    ) -> "StemScan":
        """That of stems of ``length`` rows behind the trunk rows ``last_rows``."""
        again: list[int] = []
        start, parents, last = [], [], []
        for position, row in enumerate(last_rows):
            rows, state = states.to_scan_again(row)
            start.append(state)
            parents += [-1 - position, *range(len(again), len(again) + len(rows) - 1)]
            again += rows
            last.append(len(again) - 1)
        for row in last:
            parents += [row, *range(len(parents), len(parents) + length - 1)]
        lineage = Lineage.of(torch.tensor(parents, dtype=torch.int64), space.width)
        stem_ends = len(again) + length * torch.arange(1, len(last_rows) + 1) - 1
        device = space.kernel.device
        return cls(
            again=torch.tensor(again, dtype=torch.int64, device=device),
            start=torch.tensor(start, dtype=torch.int64, device=device),
            lineage=lineage.to(device),
            ends=lineage.chunk_of(stem_ends).to(device),
        )

    def mix(
        self, states: TrunkStates, space: StateSpace, gate: Tensor, inputs: Tensor, steps: Tensor
    ) -> tuple[Tensor, State]:
        """``state_space.mix`` of the stems' rows ``[positions * length, ...]``, and the states that
        the positions' stems leave."""
        trunk_inputs, trunk_steps = states.rows(space.number, self.again)
        before = len(self.again)
        mixed, ends = mix(
            space,
            F.pad(gate, (0, 0, before, 0)),
            torch.cat([trunk_inputs, inputs]),
            torch.cat([trunk_steps, steps]),
            self.lineage,
            states.states(space.number).at(self.start),
        )
        return mixed[before:], ends.at(self.ends)


@functools.lru_cache(maxsize=64)
def one_row_each(rows: int, width: int, device: torch.device) -> Lineage:
    """Rows that each begin with a state of their own, in the order of these."""
    return Lineage.of(-1 - torch.arange(rows), width).to(device)


class StateBytes(NamedTuple):
    """Of all state-space layers of a rank's stage: what each rollout's states take, and what each
    token of the trunk takes."""

    rollout: int
    trunk_token: int


NO_STATES = StateBytes(rollout=0, trunk_token=0)


def state_bytes(model: torch.nn.Module) -> StateBytes:
    """Those of ``model``."""
    rollout, rows = 0, 0
    for module in model.modules():
        if isinstance(module, MambaMixer):
            space = StateSpace.of(module)
            before = space.nothing_before()
            rollout += sum(values.numel() * values.element_size() for values in before)
            rows += (len(space.kernel) + space.heads) * space.kernel.element_size()
    return StateBytes(rollout, rows + -(-rollout // CHUNK_ROWS))
