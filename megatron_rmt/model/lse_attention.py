"""Attention over a tree of tokens on a CPU: flash attention of its parts, merged by log-sum-exp."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rmt.model.blocks import Block, _batch, clipped, rows_or_all

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# The CPU's flash attention takes few rows in small blocks, whose backward in bf16 is slower than in
# fp32, conversion included: up to nine times for the shortest, until about these numbers of rows.
_ROWS_FOR_BF16, _ROWS_FOR_BF16_CAUSAL = 768, 256


@dataclass(frozen=True)
class _Run:
    """``count`` neighbouring segments of ``length`` rows each, from the own row ``first`` on."""

    first: int
    length: int
    count: int

    def of(self, rows: Tensor) -> Tensor:
        """``[tokens, heads, dim]`` as ``[segments, heads, length, dim]``, a view."""
        own = rows[self.first : self.first + self.count * self.length]
        return own.unflatten(0, (self.count, self.length)).transpose(1, 2)


@dataclass(frozen=True)
class _Context:
    """The own rows ``[first, limit)`` see all rows of ``ancestors``, spans ``(first, limit)``."""

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


def _runs(blocks: Sequence[Block], rows: slice) -> list[_Run]:
    runs: list[_Run] = []
    for segment in (segment for block in blocks for segment in block.segments()):
        own = clipped(*segment, rows)
        if own is None:
            continue
        length, last = own[1] - own[0], runs[-1] if runs else None
        if last and last.length == length:
            runs[-1] = _Run(last.first, length, last.count + 1)
        else:
            runs.append(_Run(own[0] - rows.start, length, 1))
    return runs


def _contexts(blocks: Sequence[Block], rows: slice) -> list[_Context]:
    contexts = []
    for block in blocks:
        trunk, stem = (block.trunk_first, block.trunk_limit), (block.first, block.stem_limit)
        seen = [(stem, [trunk]), ((block.stem_limit, block.limit), [trunk, stem])]
        # The rows of a segment that another rank begins see what that one holds of it.
        cut = (own for own in block.segments() if own[0] < rows.start < own[1])
        seen += [(segment, [(segment[0], rows.start)]) for segment in cut]
        for segment, spans in seen:
            ancestors = tuple(span for span in spans if span[1] > span[0])
            own = clipped(*segment, rows)
            if ancestors and own:
                contexts.append(_Context(*(row - rows.start for row in own), ancestors))
    return contexts


class LseAttention:
    """Unmasked flash attention of each part, merged by log-sum-exp; CPU, fp32, fp64 and bf16."""

    def __init__(self, blocks: Sequence[Block], rows: slice | None = None) -> None:
        self.blocks = blocks
        own = rows_or_all(rows, blocks)
        self._parts = own, _runs(blocks, own), _contexts(blocks, own)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        # The kernels want all of one width.
        width = value.shape[-1]
        if width < key.shape[-1]:
            value = F.pad(value, (0, key.shape[-1] - width))
        elif width > key.shape[-1]:
            query, key = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key))
        output = _MergedParts.apply(query, key, value, sink, *self._parts, scale)
        return output[..., :width]


class _MergedParts(torch.autograd.Function):
    """With scores s, a row's output over the union of two parts is the mean of their outputs
    weighted by exp(lse), lse = log sum exp(s) of each part.

    Backward needs no gradient through that: the probability of a key is exp(s - lse) with the
    merged lse, whichever part it is in, so flash attention's own backward, called on one part with
    the merged output and lse, gives that part's share of all gradients (as ring attention does).
    A sink is one more part, of one key whose value is zero. Partial outputs are merged, and shares
    summed, in fp32 for bf16.
    """

    @staticmethod
    def forward(ctx, query, key, value, sink, own, runs, contexts, scale):
        wide = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty_like(query, dtype=wide, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:2], dtype=wide)
        of_own_rows = query, key[own], value[own]
        for run in runs:
            inputs = (run.of(x) for x in of_own_rows)
            part, part_lse = _flash(*inputs, 0.0, True, scale=scale)
            run.of(output).copy_(part)
            run.of(lse[..., None]).copy_(part_lse[..., None])
        for context in contexts:
            rows = slice(context.first, context.limit)
            keys, values = context.keys(key), context.keys(value)
            heads = keys.shape[1]
            part, part_lse = _flash(
                _fold(query[rows], heads), _batch(keys), _batch(values), 0.0, False, scale=scale
            )
            merged, merged_lse = (_by_kv_head(x[rows], heads) for x in (output, lse[..., None]))
            part_lse = _unfold(part_lse[..., None], len(merged))
            share = torch.sigmoid(part_lse - merged_lse)
            merged.lerp_(_unfold(part, len(merged)).to(wide), share)
            merged_lse.copy_(torch.logaddexp(merged_lse, part_lse))
        if sink is not None:
            parts_lse, lse = lse, torch.logaddexp(lse, sink.to(wide))
            output *= torch.exp(parts_lse - lse)[..., None]
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, sink, output, lse)
        ctx.parts = own, runs, contexts, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, sink, output, lse = ctx.saved_tensors
        own, runs, contexts, scale = ctx.parts
        gradients = [
            torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (query, key, value)
        ]
        of_own_rows = gradients[0], gradients[1][own], gradients[2][own]
        inputs = gradient, query, key[own], value[own], output
        for run in runs:
            parts = (run.of(x) for x in inputs)
            shares = _part_backward(*parts, run.of(lse[..., None])[..., 0], True, scale)
            for total, share in zip(of_own_rows, shares, strict=True):
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
            total = _by_kv_head(gradients[0][rows], heads)
            total += _unfold(of_query, len(total))
            context.add(gradients[1], of_key[0].transpose(0, 1))
            context.add(gradients[2], of_value[0].transpose(0, 1))
        of_query, of_key, of_value = (x.to(query.dtype) for x in gradients)
        of_sink = None
        if sink is not None:
            found = (gradient.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
            of_sink = -(torch.exp(sink.to(lse.dtype) - lse) * found).sum(0).to(sink.dtype)
        return of_query, of_key, of_value, of_sink, None, None, None, None


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


def _by_kv_head(rows: Tensor, kv_heads: int) -> Tensor:
    """``[rows, heads, dim]`` as ``[rows, kv heads, heads / kv heads, dim]``, a view."""
    return rows.unflatten(1, (kv_heads, -1))


def _fold(rows: Tensor, kv_heads: int) -> Tensor:
    """``[rows, heads, dim]`` as ``[1, kv heads, heads / kv heads * rows, dim]``.

    Query heads that share a key head become rows: taller products.
    """
    return _by_kv_head(rows, kv_heads).permute(1, 2, 0, 3).flatten(1, 2)[None]


def _unfold(folded: Tensor, rows: int) -> Tensor:
    """What ``_by_kv_head`` gives of the rows that ``_fold`` made ``folded`` of, a view."""
    return folded[0].unflatten(1, (-1, rows)).permute(2, 0, 1, 3)
