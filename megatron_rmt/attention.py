"""Attention over a tree of tokens, for training and for generation.

The contexts of one document nest, so a document is one packed sequence: its **trunk** once, for
each chosen position a **stem** (the instruction), for each rollout of that position a **branch**.
A token sees its ancestors only. What a token may see is a *plan*; the plan travels as Megatron's
``packed_seq_params``, never as a global, because activation recompute and pipeline schedules run
earlier micro-batches again.

Two kinds of plan, one attention: ``TreePlan`` for the update (autograd, everything in one packed
sequence) and the generation plans, which keep keys and values in a ``KeyValueStore`` that lives for
one step. ``attach_tree_attention`` teaches a model's own core attention to follow plans; calls
without a plan reach the original unchanged.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_rmt.tree_attention import Block, TreeAttention, backend_for, masked_attention

# Megatron caches one rotary table per requested length: ask for few different lengths.
ROTARY_TABLE_STEP = 1024


@dataclass
class Plan(PackedSeqParams):
    """What each token of a packed sequence ``[tokens, 1, hidden]`` may see, and its position.

    positions: ``[padded tokens]`` int64, the rotary position of each token.
    tokens: number of real tokens; what follows is padding, sees nothing and yields zeros.
    """

    positions: Tensor | None = None
    tokens: int = 0

    def use_positions(self, positions: Tensor, longest: int) -> None:
        """Set ``positions``, all below ``longest``."""
        self.positions = positions
        # "sbhd" keeps Megatron from splitting the sequence; the lengths only size its rotary table.
        self.qkv_format = "sbhd"
        self.max_seqlen_q = -(-longest // ROTARY_TABLE_STEP) * ROTARY_TABLE_STEP
        self.max_seqlen_kv = self.max_seqlen_q

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of ``query`` ``[tokens, heads, dim]`` over ``key``, ``value``
        ``[tokens, kv heads, dim]`` (rotated, this layer's): ``[tokens, heads, dim]``."""
        raise NotImplementedError(f"{type(self).__name__} must say how its tokens attend.")


@dataclass
class TreePlan(Plan):
    """The update's plan: documents and chosen positions, a few integers for each.

    blocks: cover the rows ``[0, tokens)`` in order. attention: a name of ``--rmt-attention``.
    """

    blocks: tuple[Block, ...] = ()
    attention: str = "auto"
    _backend: TreeAttention | None = field(default=None, init=False, repr=False, compare=False)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        # What a backend prepares from the blocks serves all layers, and recomputed ones.
        if self._backend is None or self._backend.blocks is not self.blocks:
            self._backend = backend_for(self.attention, query.device)(self.blocks)
        return self._backend(query, key, value, scale)


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
            mask = F.pad(causal, (limit - first, 0), value=True)
            outputs.append(masked_attention(query[index], keys, values, mask, scale))
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


def attach_tree_attention(model: torch.nn.Module) -> int:
    """Let every core attention of ``model`` follow a ``Plan``; returns how many there are.

    Only ``forward`` of each core attention *instance* is wrapped: parameters, checkpoint keys,
    linear layers (and so FP8) and calls without a plan stay those of the model's own spec, local
    or Transformer Engine. Harmless when called twice.
    """
    attached = 0
    for module in model.modules():
        if isinstance(module, SelfAttention):
            _follow_plans(module.core_attention, module.layer_number, _softmax_scale(module))
            attached += 1
    for module in model.modules():
        if hasattr(module, "rotary_pos_emb") and hasattr(module, "decoder"):
            _rotate_by_plan(module.decoder)
    return attached


def _softmax_scale(attention: SelfAttention) -> float:
    width = attention.hidden_size_per_attention_head
    return attention.config.softmax_scale or 1.0 / math.sqrt(width)


def _follow_plans(core_attention: torch.nn.Module, layer: int, scale: float) -> None:
    if getattr(core_attention.forward, "follows_plans", False):
        return
    original = core_attention.forward

    @functools.wraps(original)
    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = kwargs.get("packed_seq_params")
        if not isinstance(plan, Plan):
            return original(query, key, value, *args, **kwargs)
        real = slice(0, plan.tokens)
        output = plan.attend(layer, query[real, 0], key[real, 0], value[real, 0], scale)
        output = output.flatten(1)
        if plan.tokens < query.shape[0]:
            output = F.pad(output, (0, 0, 0, query.shape[0] - plan.tokens))
        return output[:, None]

    forward.follows_plans = True
    core_attention.forward = forward


def _rotate_by_plan(decoder: torch.nn.Module) -> None:
    if getattr(decoder, "rotates_by_plan", False):
        return

    def pick_positions(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        plan, table = kwargs.get("packed_seq_params"), kwargs.get("rotary_pos_emb")
        if isinstance(plan, Plan) and table is not None:
            kwargs["rotary_pos_emb"] = table.index_select(0, plan.positions)
        return args, kwargs

    decoder.register_forward_pre_hook(pick_positions, with_kwargs=True)
    decoder.rotates_by_plan = True
