"""New tokens of rollouts: queries and keys rotated, keys and values stored in tails.

Megatron rotates queries and keys each by itself and anew in each layer, and storing them takes two
more operations; where a step of decoding has few rows, launching all that takes longer than doing
it. Here it is one operation of a layer; cosines and sines are computed once for all layers.
"""

import torch
from torch import Tensor

from megatron_rmt.rollout.decode_attention import runs_kernels

# Cosines and sines of each token's angles, [tokens, rotated dims] fp32.
Rotation = tuple[Tensor, Tensor]


def store_rotated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation | None,
    tails: tuple[Tensor, Tensor],
    written: Tensor,
    columns: Tensor,
) -> Tensor:
    """Store keys, rotated, and values at the ``columns`` of the tails ``written``; returns the
    rotated queries.

    query: ``[tokens, heads, dim]``. key, value: ``[tokens, kv heads, dim]``. rotation: None where
    queries and keys are rotated already, or never. tails: keys and values
    ``[tails, kv heads, capacity, dim]``. written: int64 ``[copies, tokens]``. columns: int64
    ``[tokens]``. Pairs of dimensions stand half of the rotated ones apart; what follows those is
    not rotated. Arithmetic is fp32 (fp64 for fp64 inputs), rounded once.
    """
    if rotation is not None and runs_kernels(query):
        from megatron_rmt.rollout import store_rotated_triton

        return store_rotated_triton.store(query, key, value, rotation, tails, written, columns)
    if rotation is not None:
        query, key = rotated(query, *rotation), rotated(key, *rotation)
    for stored, new in zip(tails, (key, value), strict=True):
        stored.transpose(1, 2)[written, columns] = new
    return query


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``x`` ``[tokens, heads, dim]`` rotated, by torch's own operations on any device."""
    width = cosine.shape[-1]
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    turned, rest = exact.split([width, x.shape[-1] - width], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine[:, None] + torch.cat([-second, first], dim=-1) * sine[:, None]
    return torch.cat([turned, rest], dim=-1).to(x.dtype)
