"""Attention while rollouts are generated: plans over keys and values that are stored for one step.

The trunk is stored once and read by every rollout; what a rollout has of its own, its stem and its
branch, is its tail. ``TrunkPlan`` reads trunks, ``StemPlan`` starts the tails, ``DecodePlan`` adds
one token to each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rmt.attention import Plan, TreePlan


class KeyValueStore:
    """Keys and values of one rank for one step of rollouts, per layer.

    The trunk ``[kv heads, trunk tokens, dim]`` is stored once and read by every rollout; a tail
    ``[rollouts, kv heads, capacity, dim]`` holds what each rollout has after it (stem, branch).
    Keys are rotated when they are written.
    """

    def __init__(self, trunk_tokens: int) -> None:
        self.trunk_tokens = trunk_tokens
        self.trunk: dict[int, tuple[Tensor, Tensor]] = {}
        self.tail: dict[int, tuple[Tensor, Tensor]] = {}
        self.capacity = 0

    def write_trunk(self, layer: int, first: int, key: Tensor, value: Tensor) -> None:
        """Store ``[tokens, kv heads, dim]`` at trunk row ``first``."""
        if layer not in self.trunk:
            shape = (key.shape[1], self.trunk_tokens, key.shape[2])
            self.trunk[layer] = (key.new_empty(shape), value.new_empty(shape))
        for stored, new in zip(self.trunk[layer], (key, value), strict=True):
            stored[:, first : first + new.shape[0]] = new.transpose(0, 1)

    def start_tails(self, layer: int, key: Tensor, value: Tensor, group: int) -> None:
        """``group`` tails per position, each begun with ``[positions, stem, kv heads, dim]``."""
        tails = []
        for new in (key, value):
            positions, length, heads, width = new.shape
            tail = new.new_empty(positions * group, heads, self.capacity, width)
            tail[:, :, :length] = new.transpose(1, 2).repeat_interleave(group, dim=0)
            tails.append(tail)
        self.tail[layer] = (tails[0], tails[1])

    def write_tails(self, layer: int, column: int, key: Tensor, value: Tensor) -> None:
        """Store one token per rollout, ``[rollouts, kv heads, dim]``, at ``column``."""
        for tail, new in zip(self.tail[layer], (key, value), strict=True):
            tail[:, :, column] = new

    def keep(self, rows: Tensor) -> None:
        """Drop every tail but ``rows`` (int64 indices): finished rollouts leave the batch."""
        for layer, (key, value) in self.tail.items():
            self.tail[layer] = (key.index_select(0, rows), value.index_select(0, rows))


@dataclass
class TrunkPlan(TreePlan):
    """Prefill of a micro-batch's trunks: documents attend causally, keys and values are kept.

    first_row: where this micro-batch's trunk starts in the store.
    """

    store: KeyValueStore | None = None
    first_row: int = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.store.write_trunk(layer, self.first_row, key, value)
        return super().attend(layer, query, key, value, scale)


@dataclass
class StemPlan(Plan):
    """Prefill of the stems, ``[positions * stem length]`` tokens, against the stored trunk.

    visible: per position, the rows ``(first, limit)`` of the stored trunk that it sees.
    group: rollouts that will share each stem.
    """

    store: KeyValueStore | None = None
    visible: Sequence[tuple[int, int]] = ()
    group: int = 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        positions = len(self.visible)
        length = query.shape[0] // positions
        query, key, value = (x.view(positions, length, *x.shape[1:]) for x in (query, key, value))
        self.store.start_tails(layer, key, value, self.group)
        trunk_key, trunk_value = self.store.trunk[layer]
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
        outputs = []
        for index, (first, limit) in enumerate(self.visible):
            keys = torch.cat([trunk_key[:, first:limit].transpose(0, 1), key[index]])
            values = torch.cat([trunk_value[:, first:limit].transpose(0, 1), value[index]])
            output = F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (query[index], keys, values)),
                attn_mask=F.pad(causal, (limit - first, 0), value=True),
                scale=scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)


@dataclass(frozen=True)
class TrunkGroup:
    """Rollouts ``[first, limit)`` of the batch, which all read trunk rows
    ``[trunk_first, trunk_limit)``.

    bias: ``[rollouts, 1, trunk rows]`` fp32, 0 where a rollout sees the row, else -inf.
    """

    first: int
    limit: int
    trunk_first: int
    trunk_limit: int
    bias: Tensor


@dataclass
class DecodePlan(Plan):
    """One new token for each live rollout, ``[rollouts]`` tokens, all with equally long tails.

    groups: which trunk rows each rollout sees, rollouts of one sample together.
    column: where this token's key and value go in the tails.
    """

    store: KeyValueStore | None = None
    groups: Sequence[TrunkGroup] = ()
    column: int = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.store.write_tails(layer, self.column, key, value)
        rollouts, heads, width = query.shape
        kv_heads = key.shape[1]
        repeats = heads // kv_heads
        # Query heads that share a key head become rows, so that keys are read once and not copied.
        query = (query * scale).view(rollouts, kv_heads, repeats, width)
        trunk_key, trunk_value = self.store.trunk[layer]
        tail_key, tail_value = (x[:, :, : self.column + 1] for x in self.store.tail[layer])
        outputs = []
        for group in self.groups:
            count = group.limit - group.first
            own = query[group.first : group.limit]
            trunk = slice(group.trunk_first, group.trunk_limit)
            by_head = own.transpose(0, 1).reshape(kv_heads, count * repeats, width)
            on_trunk = torch.bmm(by_head, trunk_key[:, trunk].transpose(1, 2)).float()
            on_trunk = on_trunk.view(kv_heads, count, repeats, -1) + group.bias
            on_tail = own @ tail_key[group.first : group.limit].transpose(2, 3)
            scores = torch.cat([on_trunk, on_tail.transpose(0, 1).float()], dim=-1)
            weights = scores.softmax(dim=-1).to(value.dtype)
            split = group.trunk_limit - group.trunk_first
            from_trunk = torch.bmm(
                weights[..., :split].reshape(kv_heads, count * repeats, split),
                trunk_value[:, trunk],
            ).view(kv_heads, count, repeats, width)
            from_tail = weights[..., split:].transpose(0, 1) @ tail_value[group.first : group.limit]
            outputs.append((from_trunk.transpose(0, 1) + from_tail).reshape(count, heads, width))
        return torch.cat(outputs)
