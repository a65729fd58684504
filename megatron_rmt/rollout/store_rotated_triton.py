"""``store_rotated`` as one kernel, a program for each token and head.

Imported only where the rows are on a GPU. Tested against float64 under Triton's interpreter and
compiled for sm_90; its speed is unverified on a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

WARPS = 1


def store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: tuple[Tensor, Tensor],
    tails: tuple[Tensor, Tensor],
    written: Tensor,
    columns: Tensor,
) -> Tensor:
    """As ``store_rotated``; one launch."""
    (tokens, heads, dim), kv_heads = query.shape, key.shape[1]
    # The kernel reads a head's numbers one after the other.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output = query.new_empty(tokens, heads, dim)
    if not tokens:
        return output
    cosine, sine = rotation
    _store[(tokens, heads + kv_heads)](
        query,
        *query.stride()[:2],
        key,
        *key.stride()[:2],
        value,
        *value.stride()[:2],
        cosine,
        sine,
        output,
        tails[0],
        *tails[0].stride()[:3],
        tails[1],
        *tails[1].stride()[:3],
        written,
        *written.stride(),
        len(written),
        columns,
        heads=heads,
        dim=dim,
        turned=cosine.shape[-1],
        block_dim=triton.next_power_of_2(dim),
        num_warps=WARPS,
    )
    return output


@triton.jit
def _store(
    query,
    query_token,
    query_head,
    key,
    key_token,
    key_head,
    value,
    value_token,
    value_head,
    cosine,
    sine,
    output,
    keys,
    keys_tail,
    keys_head,
    keys_column,
    values,
    values_tail,
    values_head,
    values_column,
    written,
    written_copy,
    written_token,
    copies,
    columns,
    heads: tl.constexpr,
    dim: tl.constexpr,
    turned: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One query head of one token, or, from program ``heads`` on, one head of keys and values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, block_dim)
    wide = dims < dim
    if head < heads:
        source = query + token * query_token + head * query_head
        turned_query = _rotated(source, cosine, sine, token, dims, dim, turned)
        target = output + (token * heads + head) * dim + dims
        tl.store(target, turned_query.to(output.dtype.element_ty), mask=wide)
    else:
        kv_head = head - heads
        source = key + token * key_token + kv_head * key_head
        exact_key = _rotated(source, cosine, sine, token, dims, dim, turned)
        turned_key = exact_key.to(keys.dtype.element_ty)
        own = tl.load(value + token * value_token + kv_head * value_head + dims, mask=wide)
        column = tl.load(columns + token)
        for copy in range(copies):
            tail = tl.load(written + copy * written_copy + token * written_token)
            at = keys + tail * keys_tail + kv_head * keys_head + column * keys_column
            tl.store(at + dims, turned_key, mask=wide)
            at = values + tail * values_tail + kv_head * values_head + column * values_column
            tl.store(at + dims, own, mask=wide)


@triton.jit
def _rotated(source, cosine, sine, token, dims, dim: tl.constexpr, turned: tl.constexpr):
    """A head of one token, in fp32: each of its first ``turned`` numbers with the one half of
    those away."""
    x = tl.load(source + dims, mask=dims < dim, other=0.0).to(tl.float32)
    half: tl.constexpr = turned // 2
    turns = dims < turned
    partner = tl.where(dims < half, dims + half, dims - half)
    other = tl.load(source + partner, mask=turns, other=0.0).to(tl.float32)
    other = tl.where(dims < half, -other, other)
    angle = token * turned + dims
    cosines = tl.load(cosine + angle, mask=turns, other=1.0)
    return x * cosines + other * tl.load(sine + angle, mask=turns, other=0.0)
