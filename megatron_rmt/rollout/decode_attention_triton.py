"""``decode_attention`` as two kernels: parts of the keys, then the parts joined.

A program of the first kernel reads a part of the trunk for some rows, all heads of a key head
folded into the rows of its products, or a part of one row's tail. Which keys a row sees it reads
from vectors on the device, so that a launch depends on the number of rows alone, and neither on how
many samples they come from nor on how far they have come. Each part leaves its output and the
logarithm of its sum of exponentials, by which the second kernel weighs the parts (flash decoding,
Dao et al. 2023; cascade attention, Ye et al. 2024). Scores, sums and parts are fp32.

Imported only where the rows are on a GPU. Tested against float64 under Triton's interpreter and
compiled for sm_90; its speed is unverified on a GPU.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rmt.rollout.row_limits import RowLimits

# The least rows that a product on tensor cores takes.
TAIL_LANES = 16
# Rows of a product over the trunk (rows of the batch times the heads that share a key head) and
# keys that a program holds at a time; fp32 has no tensor core, and with more it spills registers.
TRUNK_LANES = {2: 64, 4: 16}
KEYS = {2: 64, 4: 16}
WARPS, STAGES = 4, 2
# A part has at least this many keys, and there are at most so many parts.
LEAST_KEYS, MOST_PARTS = 256, 16
_LOG2_E = math.log2(math.e)


def attend(
    query: Tensor,
    trunk: tuple[Tensor, Tensor],
    tails: tuple[Tensor, Tensor],
    limits: RowLimits,
    scale: float,
    sink: Tensor | None = None,
) -> Tensor:
    """As ``decode_attention``; two launches."""
    rows, heads, dim = query.shape
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not rows:
        return output
    query, trunk, tails = _dense(query), [*map(_dense, trunk)], [*map(_dense, tails)]
    kv_heads, queries = trunk[0].shape[0], heads // trunk[0].shape[0]
    size = query.element_size()
    lanes = max(TRUNK_LANES[size], triton.next_power_of_2(queries))
    blocks = triton.cdiv(rows, lanes // queries)
    wanted = 2 * _processors(query.device)
    trunk_parts = _parts(wanted, blocks * kv_heads, trunk[0].shape[1])
    tail_parts = _parts(wanted, rows * kv_heads, tails[0].shape[2])
    parts = trunk_parts + tail_parts
    found = torch.empty(parts, rows, heads, dim, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(parts, rows, heads, dtype=torch.float32, device=query.device)
    block_dim = max(16, triton.next_power_of_2(dim))
    _attend_parts[(blocks * trunk_parts + rows * tail_parts, kv_heads)](
        query,
        *query.stride()[:2],
        *trunk,
        *trunk[0].stride()[:2],
        *trunk[1].stride()[:2],
        *tails,
        *tails[0].stride()[:3],
        *tails[1].stride()[:3],
        limits.first,
        limits.limit,
        limits.tail,
        limits.length,
        limits.start,
        found,
        log_sums,
        rows,
        scale * _LOG2_E,
        trunk_parts=trunk_parts,
        tail_parts=tail_parts,
        queries=queries,
        dim=dim,
        block_dim=block_dim,
        trunk_lanes=lanes,
        tail_lanes=max(TAIL_LANES, triton.next_power_of_2(queries)),
        keys=KEYS[size],
        num_warps=WARPS,
        num_stages=STAGES,
    )
    _join_parts[(rows, heads)](
        found,
        log_sums,
        log_sums if sink is None else sink,
        output,
        rows,
        parts=parts,
        has_sink=sink is not None,
        heads=heads,
        dim=dim,
        block_dim=block_dim,
        num_warps=1,
    )
    return output


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _parts(wanted: int, programs: int, most_keys: int) -> int:
    """Of how many parts each of ``programs`` is made, so that there are ``wanted`` programs."""
    longest = min(MOST_PARTS, most_keys // LEAST_KEYS)
    return max(1, min(longest, triton.cdiv(wanted, programs)))


@triton.jit
def _attend_parts(
    query,
    query_row,
    query_head,
    trunk_key,
    trunk_value,
    trunk_key_head,
    trunk_key_token,
    trunk_value_head,
    trunk_value_token,
    tail_key,
    tail_value,
    tail_key_tail,
    tail_key_head,
    tail_key_token,
    tail_value_tail,
    tail_value_head,
    tail_value_token,
    first,
    limit,
    tail,
    length,
    tail_first,
    found,
    log_sums,
    rows,
    scale,
    trunk_parts: tl.constexpr,
    tail_parts: tl.constexpr,
    queries: tl.constexpr,
    dim: tl.constexpr,
    block_dim: tl.constexpr,
    trunk_lanes: tl.constexpr,
    tail_lanes: tl.constexpr,
    keys: tl.constexpr,
):
    """``found`` ``[parts, rows, heads, dim]``, ``log_sums`` ``[parts, rows, heads]``, base 2: of
    the trunk's parts first. ``scale`` is that of scores in base 2."""
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    heads = tl.num_programs(1) * queries
    rows_of_block: tl.constexpr = trunk_lanes // queries
    on_trunk = tl.cdiv(rows, rows_of_block) * trunk_parts
    if program < on_trunk:
        part = program % trunk_parts
        lane = tl.arange(0, trunk_lanes)
        row = program // trunk_parts * rows_of_block + lane // queries
        inside = (lane < rows_of_block * queries) & (row < rows)
        row_first = tl.load(first + row, mask=inside, other=0)
        row_limit = tl.load(limit + row, mask=inside, other=0)
        row_first = tl.where(row_limit > 0, row_first, 2147483647)
        # What any of these rows sees, cut into parts of whole blocks of keys.
        start = tl.min(row_first, 0)
        stop = tl.max(row_limit, 0)
        blocks = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), keys), trunk_parts)
        start += part * blocks * keys
        stop = tl.minimum(stop, start + blocks * keys)
        _attend_keys(
            query,
            query_row,
            query_head,
            trunk_key + kv_head.to(tl.int64) * trunk_key_head,
            trunk_key_token,
            trunk_value + kv_head.to(tl.int64) * trunk_value_head,
            trunk_value_token,
            row,
            kv_head * queries + lane % queries,
            inside,
            start,
            stop,
            row_first,
            row_limit,
            found,
            log_sums,
            part,
            rows,
            heads,
            scale,
            dim,
            block_dim,
            trunk_lanes,
            keys,
        )
    else:
        tail_part = (program - on_trunk) % tail_parts
        own = (program - on_trunk) // tail_parts
        tail_lane = tl.arange(0, tail_lanes)
        own_length = tl.load(length + own)
        own_first = tl.load(tail_first + own)
        tail_blocks = tl.cdiv(tl.cdiv(own_length - own_first, keys), tail_parts)
        tail_start = own_first + tail_part * tail_blocks * keys
        tail_stop = tl.minimum(own_length, tail_start + tail_blocks * keys)
        own_tail = tl.load(tail + own).to(tl.int64)
        _attend_keys(
            query,
            query_row,
            query_head,
            tail_key + own_tail * tail_key_tail + kv_head.to(tl.int64) * tail_key_head,
            tail_key_token,
            tail_value + own_tail * tail_value_tail + kv_head.to(tl.int64) * tail_value_head,
            tail_value_token,
            own + tail_lane * 0,
            kv_head * queries + tail_lane,
            tail_lane < queries,
            tail_start,
            tail_stop,
            tail_lane * 0 + own_first,
            tail_lane * 0 + own_length,
            found,
            log_sums,
            trunk_parts + tail_part,
            rows,
            heads,
            scale,
            dim,
            block_dim,
            tail_lanes,
            keys,
        )


@triton.jit
def _attend_keys(
    query,
    query_row,
    query_head,
    key,
    key_token,
    value,
    value_token,
    row,
    head,
    inside,
    start,
    stop,
    first,
    limit,
    found,
    log_sums,
    part,
    rows,
    heads,
    scale,
    dim: tl.constexpr,
    block_dim: tl.constexpr,
    lanes: tl.constexpr,
    keys: tl.constexpr,
):
    """Attention of each lane's ``row`` and ``head`` over the keys from ``start`` to ``stop`` that
    are in its ``first`` to ``limit``."""
    dims = tl.arange(0, block_dim)
    wide = dims < dim
    cells = row.to(tl.int64) * query_row + head * query_head
    own_query = tl.load(
        query + cells[:, None] + dims[None], mask=inside[:, None] & wide[None], other=0.0
    )
    maximum = tl.full([lanes], -float("inf"), tl.float32)
    total = tl.zeros([lanes], tl.float32)
    result = tl.zeros([lanes, block_dim], tl.float32)
    for at in range(start, stop, keys):
        token = at + tl.arange(0, keys)
        held = (token < stop)[:, None] & wide[None]
        keys_here = tl.load(key + token[:, None] * key_token + dims[None], mask=held, other=0.0)
        scores = tl.dot(own_query, tl.trans(keys_here), input_precision="ieee") * scale
        seen = (token[None] >= first[:, None]) & (token[None] < limit[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        # A lane that has seen no key yet must not take infinity from infinity.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrunk = tl.exp2(maximum - base)
        total = total * shrunk + tl.sum(weights, 1)
        values_here = tl.load(
            value + token[:, None] * value_token + dims[None], mask=held, other=0.0
        )
        result = result * shrunk[:, None]
        result += tl.dot(weights.to(values_here.dtype), values_here, input_precision="ieee")
        maximum = higher
    some = total > 0
    cells = (part * rows + row).to(tl.int64) * heads + head
    log_sum = tl.where(some, maximum + tl.log2(tl.where(some, total, 1.0)), -float("inf"))
    tl.store(log_sums + cells, log_sum, mask=inside)
    result = result / tl.where(some, total, 1.0)[:, None]
    tl.store(found + cells[:, None] * dim + dims[None], result, mask=inside[:, None] & wide[None])


@triton.jit
def _join_parts(
    found,
    log_sums,
    sink,
    output,
    rows,
    parts: tl.constexpr,
    has_sink: tl.constexpr,
    heads: tl.constexpr,
    dim: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One program per row and head; where nothing is seen the output is zero."""
    cell = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    cells = rows.to(tl.int64) * heads
    dims = tl.arange(0, block_dim)
    wide = dims < dim
    maximum = -float("inf")
    if has_sink:
        maximum = tl.load(sink + tl.program_id(1)).to(tl.float32) * 1.4426950408889634
    of_sink = maximum
    for part in tl.static_range(parts):
        maximum = tl.maximum(maximum, tl.load(log_sums + part * cells + cell))
    base = tl.where(maximum == -float("inf"), 0.0, maximum)
    total = 0.0
    if has_sink:
        total = tl.exp2(of_sink - base)
    result = tl.zeros([block_dim], tl.float32)
    for part in tl.static_range(parts):
        weight = tl.exp2(tl.load(log_sums + part * cells + cell) - base)
        total += weight
        own = tl.load(found + (part * cells + cell) * dim + dims, mask=wide, other=0.0)
        result += weight * own
    result = result / tl.where(total > 0, total, 1.0)
    tl.store(output + cell * dim + dims, result.to(output.dtype.element_ty), mask=wide)
