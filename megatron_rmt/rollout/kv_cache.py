"""Attention while rollouts are generated, over keys and values that are stored for one step, and
state-space layers likewise (``state_cache``).

The trunk is stored once and read by every rollout; what a rollout has of its own, its stem and its
branch, is its tail. ``TrunkVisibility`` reads trunks, ``StemVisibility`` starts the tails,
``DecodeVisibility`` adds one token to each; on a GPU ``LimitsVisibility`` does both.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from megatron_rmt.cpu import compiled
from megatron_rmt.cpu.compiled import fused, wide
from megatron_rmt.cpu.state_space import State, StateSpace, mix
from megatron_rmt.model.layer_attention import LayerAttention
from megatron_rmt.model.visibility import TreeVisibility, Visibility
from megatron_rmt.rollout.decode_attention import decode_attention
from megatron_rmt.rollout.live_rollouts import RolloutPosition
from megatron_rmt.rollout.row_limits import RowLimits
from megatron_rmt.rollout.state_cache import StemScan, TrunkStates, one_row_each
from megatron_rmt.rollout.store_rotated import Rotation, store_rotated

# Of each group of rows of a batch: which rows, the keys and values [kv heads, trunk rows, dim] that
# they read together, and the bias [rows * queries, trunk rows] of those that a row does not see.
Trunks = Sequence[tuple[slice, Tensor, Tensor, Tensor]]


Pair = tuple[Tensor, Tensor]


def _both(change: Callable[[Tensor], Tensor], pair: Pair) -> Pair:
    """What ``change`` makes of keys and values; of latents, which are both, once."""
    key, value = pair
    changed = change(key)
    return changed, changed if value is key else change(value)


def _move(tail: Tensor, indices: Tensor) -> Tensor:
    """``tail`` with rows in the place of others: ``indices`` ``[2, moved]``, places, then rows."""
    return tail.index_copy_(0, indices[0], tail.index_select(0, indices[1]))


class KeyValueStore:
    """Keys and values of the trunks of one rank for one step of rollouts, per layer.

    ``[kv heads, trunk tokens, dim]``, stored once and read by every rollout. Keys are rotated when
    they are written. Where latents are keys and values, both are one tensor. states: what is stored
    of state-space layers.
    """

    def __init__(self, trunk_tokens: int) -> None:
        self.trunk_tokens = trunk_tokens
        self.states = TrunkStates(trunk_tokens)
        self.trunk: dict[int, tuple[Tensor, Tensor]] = {}

    def write_trunk(self, layer: int, first: int, key: Tensor, value: Tensor) -> None:
        """Store ``[tokens, kv heads, dim]`` at trunk row ``first``."""
        if layer not in self.trunk:
            self.trunk[layer] = _both(
                lambda new: new.new_empty(new.shape[1], self.trunk_tokens, new.shape[2]),
                (key, value),
            )
        for stored, new in zip(self.trunk[layer], (key, value), strict=True):
            stored[:, first : first + new.shape[0]] = new.transpose(0, 1)


class TailCache:
    """What each rollout of a batch has after the trunk, its stem and its branch, per layer.

    Keys (rotated) and values ``[rollouts, kv heads, capacity, dim]``. states: of state-space
    layers, the state after the newest token of each rollout.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.states: dict[int, State] = {}
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def start(self, layer: int, key: Tensor, value: Tensor, group: int) -> None:
        """``group`` tails per position, each begun with ``[positions, stem, kv heads, dim]``."""

        def begun(new: Tensor) -> Tensor:
            positions, length, heads, width = new.shape
            tail = new.new_empty(positions * group, heads, self.capacity, width)
            tail[:, :, :length] = new.transpose(1, 2).repeat_interleave(group, dim=0)
            return tail

        self.stored[layer] = _both(begun, (key, value))

    def write(self, layer: int, column: int, key: Tensor, value: Tensor) -> None:
        """Store one token per rollout, ``[rollouts, kv heads, dim]``, at ``column``."""
        for tail, new in zip(self.stored[layer], (key, value), strict=True):
            tail[:, :, column] = new

    def of_layer(self, layer: int, key: Tensor, value: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer's ``count`` tails, made when they are first asked for, for
        tokens such as ``[tokens, kv heads, dim]``."""
        if layer not in self.stored:
            self.stored[layer] = _both(
                lambda new: new.new_empty(count, new.shape[1], self.capacity, new.shape[2]),
                (key, value),
            )
        return self.stored[layer]

    def keep(self, rows: Sequence[int]) -> None:
        """Let ``rows``, in that order, be all: finished rollouts leave the batch.

        Copies those alone whose place changes; no memory is freed before all have finished.
        """
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        indices = torch.tensor(moved, dtype=torch.int64).view(-1, 2).t()
        for layer, tails in self.stored.items():
            if moved:
                # Once: for the next layer they are there.
                indices = indices.to(tails[0].device, non_blocking=True)
                _both(functools.partial(_move, indices=indices), tails)
            self.stored[layer] = _both(lambda tail: tail[: len(rows)], tails)
        kept = torch.tensor(rows, dtype=torch.int64)
        for layer, states in self.states.items():
            self.states[layer] = states.at(kept.to(states.state.device))


@dataclass
class TrunkVisibility(TreeVisibility):
    """Prefill of a micro-batch's trunks: documents attend causally, keys and values are kept.

    first_row: where this micro-batch's trunk starts in the store.
    """

    stores: ClassVar[bool] = True

    store: KeyValueStore | None = None
    first_row: int = 0

    def attend_all(
        self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        latents = self.latents
        stored = (key, value) if latents is None else (latents, latents)
        self.store.write_trunk(layer.number, self.first_row, *stored)
        return super().attend_all(layer, query, key, value)

    def mix(self, space: StateSpace, gate: Tensor, inputs: Tensor, steps: Tensor) -> Tensor:
        mixed, ends = self.mix_all(space, gate, inputs, steps)
        lineage = self.lineage(space.width, inputs.device)
        self.store.states.write(space, self.first_row, inputs, steps, lineage, ends)
        return mixed


@dataclass(frozen=True)
class SharedTrunk:
    """``rows`` of a batch, which all read the rows ``trunk`` of the stored trunks.

    bias: ``[rows, trunk rows]`` fp32, 0 where a row sees the trunk's row, else -inf. distance:
    ``[rows, trunk rows]`` int64, how far before a row's tail the trunk's row is, 1 for the last.
    """

    rows: slice
    trunk: slice
    bias: Tensor
    distance: Tensor

    def bias_within(self, window: int | None, places: Sequence[int]) -> Tensor:
        """``[rows * queries, trunk rows]`` fp32, for a row's queries at ``places`` of its tail and
        a layer's ``window``."""
        bias = self.bias[:, None].expand(-1, len(places), -1)
        if window is not None:
            place = torch.tensor(places, device=bias.device)[:, None]
            bias = bias.masked_fill(self.distance[:, None] + place > window, -torch.inf)
        return bias.flatten(0, 1)


def shared_trunks(
    positions: Sequence[RolloutPosition], device: torch.device | None = None
) -> list[SharedTrunk]:
    """The trunks of a batch, given the position of each row: neighbouring rows of one sample share
    a pass over its trunk."""
    trunks, start = [], 0
    for _, own in itertools.groupby(positions, key=lambda position: position.sample):
        first, limit = torch.tensor([(position.first, position.limit) for position in own]).T
        trunk = slice(int(first.min()), int(limit.max()))
        columns = torch.arange(trunk.start, trunk.stop)
        seen = (columns >= first[:, None]) & (columns < limit[:, None])
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf).to(device)
        distance = (limit[:, None] - columns).to(device)
        trunks.append(SharedTrunk(slice(start, start + len(bias)), trunk, bias, distance))
        start += len(bias)
    return trunks


@dataclass
class StoredTrunkVisibility(Visibility):
    """Rows that each see a part of the stored trunk and a tail of their own.

    trunks: which trunk rows each row of the batch sees.
    """

    stores: ClassVar[bool] = True
    reads_stored: ClassVar[bool] = True

    store: KeyValueStore | None = None
    tails: TailCache | None = None
    trunks: Sequence[SharedTrunk] = ()

    def __post_init__(self) -> None:
        self._biases: dict[int | None, list[Tensor]] = {}

    def _attend_trunk_and_tail(
        self,
        layer: LayerAttention,
        query: Tensor,
        places: Sequence[int],
        tail: tuple[Tensor, Tensor],
        tail_bias: Tensor | None,
    ) -> Tensor:
        """Attention of ``query`` ``[rows, kv heads, queries, dim]``, and in that shape.

        Query heads that share a key head are queries side by side, so that keys are read once and
        not copied. places: of the queries in their tails. tail: keys and values
        ``[rows, kv heads, length, dim]``. tail_bias: ``[queries, length]`` fp32; None: all of the
        tail is seen.
        """
        if layer.window not in self._biases:
            # The same in every layer with that window.
            self._biases[layer.window] = [
                shared.bias_within(layer.window, places).to(query.dtype) for shared in self.trunks
            ]
        trunk_key, trunk_value = self.store.trunk[layer.number]
        trunks = [
            (shared.rows, trunk_key[:, shared.trunk], trunk_value[:, shared.trunk], bias)
            for shared, bias in zip(self.trunks, self._biases[layer.window], strict=True)
        ]
        return _fused_attention(query, trunks, *tail, tail_bias, layer)


def _fused_attention(
    query: Tensor,
    trunks: Trunks,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_bias: Tensor | None,
    layer: LayerAttention,
) -> Tensor:
    """Attention over trunk and tail apart, by torch's fused kernel for CPUs, weighed together.

    Each part's output is weighed by its share exp(l) of the denominator, where l is the logarithm
    of the sum of exponentials that the kernel returns beside the output. A tail that is seen whole
    is read by a compiled loop instead, where one can be had, which also weighs.
    """
    kv_heads, queries, width = query.shape[1:]
    scale = layer.scale
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    outputs, sums = [], []
    for rows, key, value, bias in trunks:
        by_head = query[rows].transpose(0, 1).reshape(1, kv_heads, -1, width)
        output, log_sums = attend(
            by_head, key[None], value[None], attn_mask=bias[None, None], scale=scale
        )
        if layer.window is not None:
            # Of a row that sees nothing the kernel says zeros, and that the logarithm is 0.
            log_sums = log_sums.masked_fill((bias == -torch.inf).all(1), -torch.inf)
        outputs.append(output.view(kv_heads, -1, queries, width).transpose(0, 1))
        sums.append(log_sums.view(kv_heads, -1, queries).transpose(0, 1))
    on_trunk, trunk_sum = _joined(outputs), _joined(sums)
    if layer.sink is not None:
        # A key of the trunk like others, whose value is zero.
        sink = layer.sink.to(trunk_sum.dtype).view(kv_heads, -1)
        sink = sink.repeat_interleave(queries // sink.shape[1], dim=1)
        on_trunk = on_trunk * (trunk_sum - sink).sigmoid()[..., None].to(on_trunk.dtype)
        trunk_sum = torch.logaddexp(trunk_sum, sink)
    if tail_bias is None and compiled.is_available():
        return _with_tail(query, tail_key, tail_value, on_trunk, trunk_sum, scale)
    if tail_bias is not None:
        tail_bias = tail_bias.to(query.dtype)[None, None]
    on_tail, tail_sum = attend(query, tail_key, tail_value, attn_mask=tail_bias, scale=scale)
    share = (trunk_sum - tail_sum).sigmoid()[..., None].to(query.dtype)
    return torch.lerp(on_tail, on_trunk, share)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


@fused
def _with_tail(
    query: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    on_trunk: Tensor,
    trunk_sum: Tensor,
    scale: float,
) -> Tensor:
    """Attention over whole tails, joined with that over the trunk, ``on_trunk``
    ``[rows, kv heads, queries, dim]``, whose log-sums are ``trunk_sum``.

    Tails are too short for a product of each of them to pay.
    """
    scores = (wide(query)[:, :, :, None] * wide(tail_key)[:, :, None]).sum(-1) * scale
    largest = torch.maximum(scores.amax(-1), trunk_sum)
    weights = (scores - largest[..., None]).exp()
    of_trunk = (trunk_sum - largest).exp()
    total = weights.sum(-1) + of_trunk
    on_tail = (weights[..., None] * wide(tail_value)[:, :, None]).sum(-2)
    joined = (on_tail + of_trunk[..., None] * on_trunk) / total[..., None]
    return joined.to(query.dtype)


@dataclass
class StemVisibility(StoredTrunkVisibility):
    """Prefill of the stems, ``[positions * stem length]`` tokens, against the stored trunk.

    The rows of ``trunks`` are positions. group: rollouts that will share each stem. last_rows: of
    each position, the last row of the stored trunk that it sees.
    """

    group: int = 1
    last_rows: Sequence[int] = ()
    _scan: StemScan | None = field(default=None, init=False, repr=False)

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        positions = self.trunks[-1].rows.stop
        length, (kv_heads, width) = query.shape[0] // positions, key.shape[1:]
        key, value = _both(lambda x: x.view(positions, length, kv_heads, width), (key, value))
        self.tails.start(layer.number, key, value, self.group)
        # [positions, kv heads, heads of a kv head * stem, dim]
        query = query.view(positions, length, kv_heads, -1, width).permute(0, 2, 3, 1, 4)
        repeats = query.shape[2]
        place = torch.arange(length, device=query.device)
        unseen = place > place[:, None]
        if layer.window is not None:
            unseen |= place < place[:, None] - layer.window
        tail_bias = torch.zeros_like(unseen, dtype=torch.float32).masked_fill_(unseen, -torch.inf)
        output = self._attend_trunk_and_tail(
            layer,
            query.flatten(2, 3),
            [*range(length)] * repeats,
            (key.transpose(1, 2), value.transpose(1, 2)),
            tail_bias.repeat(repeats, 1),
        )
        output = output.view(positions, kv_heads, repeats, length, width).permute(0, 3, 1, 2, 4)
        return output.reshape(positions * length, -1, width)

    def mix(self, space: StateSpace, gate: Tensor, inputs: Tensor, steps: Tensor) -> Tensor:
        states = self.store.states
        if self._scan is None:
            length = len(inputs) // len(self.last_rows)
            self._scan = StemScan.of(states, self.last_rows, length, space)
        mixed, ends = self._scan.mix(states, space, gate, inputs, steps)
        shared = torch.arange(len(self.last_rows), device=inputs.device)
        self.tails.states[space.number] = ends.at(shared.repeat_interleave(self.group))
        return mixed


@dataclass
class DecodeVisibility(StoredTrunkVisibility):
    """One new token for each live rollout, ``[rollouts]`` tokens, all with equally long tails.

    The rows of ``trunks`` are rollouts. column: where this token's key and value go in the tails.
    """

    column: int = 0

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.tails.write(layer.number, self.column, key, value)
        rollouts, kv_heads, width = key.shape
        first = 0 if layer.window is None else max(0, self.column - layer.window)
        tail = tuple(x[:, :, first : self.column + 1] for x in self.tails.stored[layer.number])
        query = query.view(rollouts, kv_heads, -1, width)
        places = [self.column] * query.shape[2]
        output = self._attend_trunk_and_tail(layer, query, places, tail, None)
        return output.reshape(rollouts, -1, width)

    def mix(self, space: StateSpace, gate: Tensor, inputs: Tensor, steps: Tensor) -> Tensor:
        lineage = one_row_each(len(inputs), space.width, inputs.device)
        start = self.tails.states[space.number]
        mixed, self.tails.states[space.number] = mix(space, gate, inputs, steps, lineage, start)
        return mixed


@dataclass
class LimitsVisibility(Visibility):
    """Stems or new tokens whose rows see what vectors on the device say, on anything but a CPU.

    limits: of the rows, once their keys and values are written into the tails ``written`` int64
    ``[copies, tokens]`` at ``columns`` int64 ``[tokens]``. count: tails of the batch. rotation: of
    the tokens, in all layers; None where the layers rotate.
    """

    stores: ClassVar[bool] = True
    reads_stored: ClassVar[bool] = True

    store: KeyValueStore | None = None
    tails: TailCache | None = None
    limits: RowLimits | None = None
    written: Tensor | None = None
    columns: Tensor | None = None
    count: int = 0
    rotation: Rotation | None = None
    _within: dict[int | None, RowLimits] = field(default_factory=dict, init=False, repr=False)

    def take_angles(self, angles: Tensor) -> bool:
        angles = angles[: self.tokens, 0, 0]
        self.rotation = angles.cos(), angles.sin()
        return True

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        number, window = layer.number, layer.window
        tails = self.tails.of_layer(number, key, value, self.count)
        written, columns = self.written, self.columns
        query = store_rotated(query, key, value, self.rotation, tails, written, columns)
        if window not in self._within:
            self._within[window] = self.limits.within(window)
        trunk, limits = self.store.trunk[number], self._within[window]
        return decode_attention(query, trunk, tails, limits, layer.scale, layer.sink)


@dataclass
class IdleVisibility(Visibility):
    """No token at all, only padding: a rank that has nothing to do takes part in a pass of those
    that share its experts."""

    def attend(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query

    def mix(self, space: StateSpace, gate: Tensor, inputs: Tensor, steps: Tensor) -> Tensor:
        return gate
