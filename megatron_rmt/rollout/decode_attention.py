"""Attention of generation where the host does not know what each row sees.

Every row reads a part of the trunks, which it shares with others, and a tail of its own; where both
end stands in vectors on the device. So a step of decoding is the same sequence of operations of the
same shapes as the step before it, which is what a CUDA graph records.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from megatron_rmt.rollout.row_limits import RowLimits

# Dims that the kernels hold on a processor at once; latents have more.
WIDEST_HEAD = 256


def decode_attention(
    query: Tensor,
    trunk: tuple[Tensor, Tensor],
    tails: tuple[Tensor, Tensor],
    limits: RowLimits,
    scale: float,
    sink: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each row over what ``limits`` lets it see of trunk and tail.

    query: ``[rows, heads, dim]``. trunk: keys and values ``[kv heads, trunk tokens, dim]``. tails:
    the same ``[tails, kv heads, capacity, dim]``. sink: as in ``LayerAttention``. Scores, the
    softmax and the sums over keys are fp32 (fp64 for fp64 inputs). Returns ``[rows, heads, dim]``;
    zeros where a row sees nothing.
    """
    if runs_kernels(query) and query.shape[-1] <= WIDEST_HEAD:
        from megatron_rmt.rollout import decode_attention_triton

        return decode_attention_triton.attend(query, trunk, tails, limits, scale, sink)
    return attend(query, trunk, tails, limits, scale, sink)


def runs_kernels(x: Tensor) -> bool:
    """Whether kernels of Triton take ``x``: on a GPU, in fp32 or half precision, if it is there."""
    return x.is_cuda and x.dtype != torch.float64 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    """Looked for once, not for each layer and token."""
    return importlib.util.find_spec("triton") is not None


def attend(
    query: Tensor,
    trunk: tuple[Tensor, Tensor],
    tails: tuple[Tensor, Tensor],
    limits: RowLimits,
    scale: float,
    sink: Tensor | None = None,
) -> Tensor:
    """The same with all scores written out, by torch's own operations on any device."""
    (rows, heads, width), kv_heads = query.shape, trunk[0].shape[0]
    by_head = query.view(rows, kv_heads, -1, width)
    folded = by_head.transpose(0, 1).reshape(kv_heads, -1, width)
    own = limits.tail.long()
    tail_key, tail_value = (stored[own].flatten(0, 1) for stored in tails)
    on_trunk = _wide_product(folded, trunk[0].transpose(1, 2))
    on_trunk = on_trunk.view(kv_heads, rows, -1, on_trunk.shape[-1]).transpose(0, 1)
    on_tail = _wide_product(by_head.flatten(0, 1), tail_key.transpose(1, 2))
    on_tail = on_tail.view(rows, kv_heads, -1, on_tail.shape[-1])
    scores = torch.cat([on_trunk, on_tail], dim=-1) * scale
    column = torch.arange(scores.shape[-1], device=query.device)
    first, limit, _, length, start = (of[:, None] for of in limits)
    of_tail = column - on_trunk.shape[-1]
    seen = ((column >= first) & (column < limit) & (of_tail < 0)) | (
        (of_tail >= start) & (of_tail < length)
    )
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    if sink is not None:
        of_sink = sink.to(scores.dtype).view(kv_heads, -1, 1).expand(rows, -1, -1, -1)
        scores = torch.cat([scores, of_sink], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(column)]
    weights = weights.masked_fill(~seen.any(1)[:, None, None, None], 0.0).to(query.dtype)
    from_trunk, from_tail = weights.split([on_trunk.shape[-1], on_tail.shape[-1]], dim=-1)
    from_trunk = from_trunk.transpose(0, 1).reshape(kv_heads, -1, on_trunk.shape[-1])
    read_trunk = _wide_product(from_trunk, trunk[1]).view(kv_heads, rows, -1, width)
    # Unwritten columns may hold anything, which 0 would not hide.
    hidden = ~(torch.arange(tail_value.shape[1], device=query.device) < length)
    tail_value = tail_value.view(rows, kv_heads, -1, width).masked_fill(hidden[:, None, :, None], 0)
    read_tail = _wide_product(from_tail.flatten(0, 1), tail_value.flatten(0, 1))
    read = read_trunk.transpose(0, 1) + read_tail.view(rows, kv_heads, -1, width)
    return read.reshape(rows, heads, width).to(query.dtype)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Batched ``a @ b``, summed and returned in fp32 also for half-precision inputs."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.bmm(a.to(wide), b.to(wide))
