"""Attention of the update's tree: what each row sees, and three ways to compute it.

What a row sees is told by ``Block``s, a few integers for each document and each chosen position.
Each backend is made from the blocks of one micro-batch and called once per layer:

``sdpa``  one scaled-dot-product call per block with a dense mask; any device, torch's autograd.
``lse``   flash attention without masks on the CPU: each row on its own segment, causally, and on
          its ancestors, merged by their log-sum-exp. Work is what is visible, nothing more.
``flex``  FlexAttention, compiled, with one block mask per micro-batch; for CUDA. On the CPU only
          its forward runs, and slowly.

Segments: a document, a stem and a branch are runs of consecutive rows that are causal inside and
see all rows of their ancestors (a stem its trunk, a branch its trunk and its stem).
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# The CPU's flash attention takes few rows in small blocks, whose backward in bf16 is slower than in
# fp32, conversion included: up to nine times for the shortest, until about these numbers of rows.
_ROWS_FOR_BF16, _ROWS_FOR_BF16_CAUSAL = 768, 256

_NO_FLEX_BACKWARD = (
    "--rmt-attention is flex, whose backward does not exist on the CPU; pass auto, lse or sdpa."
)


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


def attended_pairs(blocks: Sequence[Block]) -> int:
    """(query row, key row) pairs that are visible, the unit of attention's cost."""
    pairs = 0
    for block in blocks:
        stem = block.stem_limit - block.first
        trunk = block.trunk_limit - block.trunk_first
        pairs += trunk * (block.limit - block.first) + stem * (stem + 1) // 2
        pairs += sum(stem * branch + branch * (branch + 1) // 2 for branch in block.branches)
    return pairs


@dataclass(frozen=True)
class Visibility:
    """Row ``q`` sees row ``k`` if and only if

        k <= q < descendants[k]   or   trunk_first[q] <= k < trunk_limit[q].

    All ``[tokens]`` int64. descendants: in the order of rows a stem is followed by its branches,
    so what descends from a row inside its block are the rows up to ``descendants``.
    """

    descendants: Tensor
    trunk_first: Tensor
    trunk_limit: Tensor

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether row ``query`` sees row ``key``: int64 tensors that broadcast, to bool."""
        inside = (key <= query) & (query < self.descendants[key])
        return inside | ((self.trunk_first[query] <= key) & (key < self.trunk_limit[query]))


def visibility(blocks: Sequence[Block], device: torch.device | None = None) -> Visibility:
    """The visibility of all rows of ``blocks``, which cover the rows from 0 on, in order."""
    descendants, spans = [], []
    for block in blocks:
        ends = [block.stem_limit, *block.branches]
        ends = [*itertools.accumulate(ends)]
        counts = [block.stem_limit - block.first, *block.branches]
        descendants += [torch.full((counts[0],), block.limit)]
        descendants += [
            torch.full((count,), end) for count, end in zip(counts[1:], ends[1:], strict=True)
        ]
        spans.append((block.limit - block.first, block.trunk_first, block.trunk_limit))
    rows, first, limit = torch.tensor(spans, dtype=torch.int64).view(-1, 3).unbind(1)
    vectors = (
        torch.cat([torch.empty(0, dtype=torch.int64), *descendants]),
        first.repeat_interleave(rows),
        limit.repeat_interleave(rows),
    )
    return Visibility(*(vector.to(device) for vector in vectors))


class TreeAttention(Protocol):
    """Attention over the blocks of one micro-batch."""

    def __init__(self, blocks: Sequence[Block]) -> None: ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """``query`` ``[tokens, heads, dim]`` over ``key`` and ``value`` ``[tokens, kv heads, dim]``
        of one layer: ``[tokens, heads, dim]``, differentiable in all three."""
        ...


class SdpaAttention:
    """One ``scaled_dot_product_attention`` call per block, on its trunk's rows and its own."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._masks: dict[Block, Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        outputs = [query[:0]]
        for block in self.blocks:
            rows = slice(block.first, block.limit)
            keys, values = key[rows], value[rows]
            if block.trunk_limit > block.trunk_first:
                trunk = slice(block.trunk_first, block.trunk_limit)
                keys = torch.cat([key[trunk], keys])
                values = torch.cat([value[trunk], values])
            mask = self._mask(block, query.device)
            outputs.append(masked_attention(query[rows], keys, values, mask, scale))
        return torch.cat(outputs)

    def _mask(self, block: Block, device: torch.device) -> Tensor | None:
        """``[rows, trunk rows + rows]`` bool, None where plainly causal. All layers need it."""
        if not block.branches and block.trunk_limit == block.trunk_first:
            return None
        if block not in self._masks:
            count, stem = block.limit - block.first, block.stem_limit - block.first
            own = torch.ones(count, count, dtype=torch.bool).tril()
            start = stem
            for length in block.branches:
                own[start : start + length, stem:start] = False
                start += length
            mask = F.pad(own, (block.trunk_limit - block.trunk_first, 0), value=True)
            self._masks[block] = mask.to(device)
        return self._masks[block]


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """``[queries, heads, dim]`` over ``[keys, kv heads, dim]``, causal where ``mask`` is None."""
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)


@dataclass(frozen=True)
class _Run:
    """``count`` neighbouring segments of ``length`` rows each, from row ``first`` on."""

    first: int
    length: int
    count: int

    def of(self, rows: Tensor) -> Tensor:
        """``[tokens, heads, dim]`` as ``[segments, heads, length, dim]``, a view."""
        own = rows[self.first : self.first + self.count * self.length]
        return own.unflatten(0, (self.count, self.length)).transpose(1, 2)


@dataclass(frozen=True)
class _Context:
    """Rows ``[first, limit)`` see all rows of ``ancestors``, spans ``(first, limit)``."""

    first: int
    limit: int
    ancestors: tuple[tuple[int, int], ...]

    def keys(self, rows: Tensor) -> Tensor:
        """The ancestors' rows of ``[tokens, kv heads, dim]``."""
        spans = [rows[first:limit] for first, limit in self.ancestors]
        return spans[0] if len(spans) == 1 else torch.cat(spans)

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """Add the gradient of ``keys(rows)`` to ``rows``."""
        sizes = [limit - first for first, limit in self.ancestors]
        for (first, limit), part in zip(self.ancestors, gradient.split(sizes), strict=True):
            rows[first:limit] += part


def _runs(blocks: Sequence[Block]) -> list[_Run]:
    runs: list[_Run] = []
    for block in blocks:
        first = block.first
        for length in (block.stem_limit - block.first, *block.branches):
            last = runs[-1] if runs else None
            if last and last.length == length:
                runs[-1] = _Run(last.first, length, last.count + 1)
            elif length:
                runs.append(_Run(first, length, 1))
            first += length
    return runs


def _contexts(blocks: Sequence[Block]) -> list[_Context]:
    contexts = []
    for block in blocks:
        trunk, stem = (block.trunk_first, block.trunk_limit), (block.first, block.stem_limit)
        for rows, ancestors in ((stem, [trunk]), ((block.stem_limit, block.limit), [trunk, stem])):
            seen = tuple(span for span in ancestors if span[1] > span[0])
            if seen and rows[1] > rows[0]:
                contexts.append(_Context(*rows, seen))
    return contexts


class LseAttention:
    """Unmasked flash attention of each part, merged by log-sum-exp; CPU, fp32, fp64 and bf16."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._parts = _runs(blocks), _contexts(blocks)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return _MergedParts.apply(query, key, value, *self._parts, scale)


class _MergedParts(torch.autograd.Function):
    """With scores s, a row's output over the union of two parts is the mean of their outputs
    weighted by exp(lse), lse = log sum exp(s) of each part.

    Backward needs no gradient through that: the probability of a key is exp(s - lse) with the
    merged lse, whichever part it is in, so flash attention's own backward, called on one part with
    the merged output and lse, gives that part's share of all gradients (as ring attention does).
    Partial outputs are merged, and shares summed, in fp32 for bf16.
    """

    @staticmethod
    def forward(ctx, query, key, value, runs, contexts, scale):
        wide = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty_like(query, dtype=wide, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:2], dtype=wide)
        for run in runs:
            own, own_lse = _flash(run.of(query), run.of(key), run.of(value), 0.0, True, scale=scale)
            run.of(output).copy_(own)
            run.of(lse[..., None]).copy_(own_lse[..., None])
        for context in contexts:
            rows = slice(context.first, context.limit)
            keys, values = context.keys(key), context.keys(value)
            heads = keys.shape[1]
            part, part_lse = _flash(
                _fold(query[rows], heads), _batch(keys), _batch(values), 0.0, False, scale=scale
            )
            merged, merged_lse = (_by_group(x[rows], heads) for x in (output, lse[..., None]))
            part_lse = _unfold(part_lse[..., None], len(merged))
            share = torch.sigmoid(part_lse - merged_lse)
            merged.lerp_(_unfold(part, len(merged)).to(wide), share)
            merged_lse.copy_(torch.logaddexp(merged_lse, part_lse))
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.parts = runs, contexts, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, output, lse = ctx.saved_tensors
        runs, contexts, scale = ctx.parts
        gradients = [
            torch.empty(x.shape, dtype=lse.dtype, device=x.device) for x in (query, key, value)
        ]
        for run in runs:
            parts = (run.of(x) for x in (gradient, query, key, value, output))
            shares = _part_backward(*parts, run.of(lse[..., None])[..., 0], True, scale)
            for total, share in zip(gradients, shares, strict=True):
                run.of(total).copy_(share)
        heads = key.shape[1]
        for context in contexts:
            rows = slice(context.first, context.limit)
            of_query, of_key, of_value = _part_backward(
                _fold(gradient[rows], heads),
                _fold(query[rows], heads),
                _batch(context.keys(key)),
                _batch(context.keys(value)),
                _fold(output[rows], heads),
                _fold(lse[rows][..., None], heads)[..., 0],
                False,
                scale,
            )
            total = _by_group(gradients[0][rows], heads)
            total += _unfold(of_query, len(total))
            context.add(gradients[1], of_key[0].transpose(0, 1))
            context.add(gradients[2], of_value[0].transpose(0, 1))
        of_query, of_key, of_value = (x.to(query.dtype) for x in gradients)
        return of_query, of_key, of_value, None, None, None


def _part_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Flash attention's backward; all ``[batch, heads, rows, dim]``, lse without dim."""
    inputs = gradient, query, key, value, output
    if query.shape[2] < (_ROWS_FOR_BF16_CAUSAL if causal else _ROWS_FOR_BF16):
        inputs = [x.to(lse.dtype) for x in inputs]
    return _flash_backward(*inputs, lse, 0.0, causal, scale=scale)


def _batch(rows: Tensor) -> Tensor:
    """``[rows, heads, dim]`` as a batch of one, ``[1, heads, rows, dim]``, a view."""
    return rows.transpose(0, 1)[None]


def _by_group(rows: Tensor, kv_heads: int) -> Tensor:
    """``[rows, heads, dim]`` as ``[rows, kv heads, heads / kv heads, dim]``, a view."""
    return rows.unflatten(1, (kv_heads, -1))


def _fold(rows: Tensor, kv_heads: int) -> Tensor:
    """``[rows, heads, dim]`` as ``[1, kv heads, heads / kv heads * rows, dim]``.

    Query heads that share a key head become rows: taller products.
    """
    return _by_group(rows, kv_heads).permute(1, 2, 0, 3).flatten(1, 2)[None]


def _unfold(folded: Tensor, rows: int) -> Tensor:
    """What ``_by_group`` gives of the rows that ``_fold`` made ``folded`` of, a view."""
    return folded[0].unflatten(1, (-1, rows)).permute(2, 0, 1, 3)


class FlexAttention:
    """FlexAttention with one block mask, which is made at the first layer of a micro-batch."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._mask: BlockMask | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if query.requires_grad and not query.is_cuda:
            raise ValueError(_NO_FLEX_BACKWARD)
        if self._mask is None:
            self._mask = self._make_mask(query.shape[0], query.device)
        attend = _compiled(flex_attention) if query.is_cuda else flex_attention
        output = attend(
            _batch(query),
            _batch(key),
            _batch(value),
            block_mask=self._mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1)

    def _make_mask(self, tokens: int, device: torch.device) -> BlockMask:
        sees = visibility(self.blocks, device)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(query, key)

        make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
        return make(visible, None, None, tokens, tokens, device=device)


@functools.cache
def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    # Trees have all sizes: one kernel for all of them instead of one for each.
    return torch.compile(function, dynamic=True)


BACKENDS: dict[str, type[TreeAttention]] = {
    "sdpa": SdpaAttention,
    "lse": LseAttention,
    "flex": FlexAttention,
}


def backend_for(name: str, device: torch.device) -> type[TreeAttention]:
    """The backend that ``--rmt-attention`` ``name`` means on ``device``.

    ``auto`` is lse on the CPU; on CUDA flex where torch can compile, else sdpa (the choice and flex
    with CUDA are unverified on GPU).

    Raises:
        ValueError: ``name`` does not run on ``device``.
    """
    on_cpu = device.type == "cpu"
    if name == "auto":
        name = "lse" if on_cpu else "flex" if _can_compile() else "sdpa"
    if name == "lse" and not on_cpu:
        raise ValueError(
            "--rmt-attention is lse, which is made of the CPU's flash attention, but the model is "
            f"on {device.type}; pass auto, flex or sdpa."
        )
    return BACKENDS[name]


def check_backend(name: str, device: torch.device) -> None:
    """Refuse, before the first step, a backend that cannot train on ``device``.

    Raises:
        ValueError: ``name`` does not run on ``device``, or its backward does not.
    """
    if backend_for(name, device) is FlexAttention and device.type == "cpu":
        raise ValueError(_NO_FLEX_BACKWARD)


def _can_compile() -> bool:
    return importlib.util.find_spec("triton") is not None and not torch._dynamo.config.disable
