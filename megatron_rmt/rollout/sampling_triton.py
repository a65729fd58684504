"""Tokens from fp32 scores on a GPU: four launches, whatever the vocabulary and the rows.

A program of a kernel reads the scores of one row. Weights are the whole numbers of ``sampling``,
so that their sums are exact here too, and the draws the same over any split of the vocabulary; what
differs from the plain path is how the device rounds an exponential. Of the collectives each stands
between two kernels: the maxima, the sums of the shards, the token.

``top_k`` and ``top_p`` leave the tokens whose weight is at least some number, which is searched by
its bits, three at a time: one more kernel, and with tensor parallelism one for each three bits.

Imported only where the scores are on a GPU. Tested against the plain path under Triton's
interpreter and compiled for sm_90; its speed is unverified on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from megatron_rmt.model.head import first_with_maximum, of_all_ranks, reduce_over_ranks

_SCALE = tl.constexpr(2.0**34)
_LEAST_EXPONENT = tl.constexpr(-24.0)
_BLOCK = tl.constexpr(256)  # columns whose weights are summed for the first level
# Columns that a program holds at a time: of one pass over a row, and of a search.
COLUMNS, SEARCH_COLUMNS = 4096, 512
ROWS = 128  # of the last kernel, whose rows hold a few numbers each
WARPS, SEARCH_WARPS, DRAW_WARPS, TELL_WARPS = 8, 4, 4, 1
# The number of a positive weight is its place among all floats from 1 on, 0 that of no weight; the
# largest weight, 2^34, has 34 * 2^23 + 1, which is below 2^30.
_BEFORE_ONE = tl.constexpr(0x3F800000 - 1)  # the bits of 1.0f, less one
_BITS = tl.constexpr(3)
_WAYS = tl.constexpr(8)
_FIRST_SHIFT = tl.constexpr(27)


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    vocab_start: int,
    tp_group: ProcessGroup | None,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``sampling.sample_tokens``."""
    rows, columns = logits.shape
    several = tp_group is not None and tp_group.size() > 1
    maxima, _ = _largest(logits, vocab_start)
    reduce_over_ranks(maxima, ReduceOp.MAX, tp_group)
    scores = logits, logits.stride(0), columns, maxima, 1.0 / temperature
    blocks = triton.cdiv(columns, _BLOCK.value)
    block_sums = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)

    def sums_of_shards(least: Tensor | None) -> Tensor:
        return of_all_ranks(_sums(scores, least, block_sums), tp_group)

    whole = shard_sums = sums_of_shards(None)
    least = None
    if top_k is not None:
        least = _least_number(scores, torch.full_like(uniforms, top_k), tp_group, counts=True)
        shard_sums = sums_of_shards(least)
    if top_p is not None:
        # All that top k leaves weighs enough, so that this number is not below that one.
        least = _least_number(scores, top_p * shard_sums.sum(0), tp_group)
        shard_sums = sums_of_shards(least)
    # The shard that holds the token tells the others its id and its score, and, as a proof that all
    # draw alike, the uniform number and 1.
    drawn = uniforms.new_empty(4, rows)
    _draw[(rows,)](
        *scores,
        maxima if least is None else least,
        block_sums,
        shard_sums,
        uniforms,
        drawn,
        rows,
        tp_group.rank() if several else 0,
        vocab_start,
        has_least=least is not None,
        ranks=len(shard_sums),
        most_blocks=max(1, triton.next_power_of_2(blocks)),
        num_warps=DRAW_WARPS,
    )
    reduce_over_ranks(drawn, ReduceOp.SUM, tp_group)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    log_probs = torch.empty_like(maxima)
    _tell[(triton.cdiv(rows, ROWS),)](
        drawn,
        maxima,
        whole,
        uniforms,
        tokens,
        log_probs,
        rows,
        1.0 / temperature,
        ranks=len(whole),
        block=ROWS,
        num_warps=TELL_WARPS,
    )
    return tokens, log_probs


def most_probable(
    logits: Tensor, *, temperature: float, vocab_start: int, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """As ``sampling.most_probable``."""
    (rows, columns), factor = logits.shape, 1.0 / temperature
    own_maxima, ids = _largest(logits, vocab_start)
    maxima = reduce_over_ranks(own_maxima.clone(), ReduceOp.MAX, tp_group)
    scores = logits, logits.stride(0), columns, maxima, factor
    blocks = triton.cdiv(columns, _BLOCK.value)
    block_sums = torch.empty(rows, blocks, dtype=torch.int64, device=logits.device)
    total = reduce_over_ranks(_sums(scores, None, block_sums), ReduceOp.SUM, tp_group)
    # The likeliest token itself weighs 1.
    log_probs = -(total / _SCALE.value).log()
    return first_with_maximum(ids, own_maxima, tp_group), log_probs.float()


def _width(columns: int) -> int:
    return min(COLUMNS, max(_BLOCK.value, triton.next_power_of_2(columns)))


def _largest(logits: Tensor, vocab_start: int) -> tuple[Tensor, Tensor]:
    """The largest score of each row of this shard, and the first token int64 that has it."""
    rows, columns = logits.shape
    maxima = logits.new_empty(rows)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _maxima[(rows,)](
        logits,
        logits.stride(0),
        columns,
        vocab_start,
        maxima,
        ids,
        width=_width(columns),
        num_warps=WARPS,
    )
    return maxima, ids


def _sums(
    scores: tuple[Tensor, int, int, Tensor, float], least: Tensor | None, block_sums: Tensor
) -> Tensor:
    """Sums of this shard's weights fp64 ``[rows]``; those of its blocks in ``block_sums``."""
    _, _, columns, maxima, _ = scores
    own = torch.empty(len(maxima), dtype=torch.float64, device=maxima.device)
    _sum_blocks[(len(maxima),)](
        *scores,
        maxima if least is None else least,
        block_sums,
        own,
        has_least=least is not None,
        width=_width(columns),
        num_warps=WARPS,
    )
    return own


def _least_number(
    scores: tuple[Tensor, int, int, Tensor, float],
    enough: Tensor,
    tp_group: ProcessGroup | None,
    *,
    counts: bool = False,
) -> Tensor:
    """The largest number int32 ``[rows]`` such that the tokens with at least that number weigh, or
    are as many as, ``enough`` fp64 ``[rows]``."""
    rows, device = len(enough), enough.device
    least = torch.zeros(rows, dtype=torch.int32, device=device)
    reached = torch.empty(rows, _WAYS.value, dtype=torch.float64, device=device)
    several = tp_group is not None and tp_group.size() > 1
    # With others each launch takes up what all have reached together; the one after the last only
    # does that.
    shifts = range(_FIRST_SHIFT.value, -2 * _BITS.value, -_BITS.value) if several else (0,)
    for shift in shifts:
        _search[(rows,)](
            *scores,
            enough,
            least,
            reached,
            shift,
            counts=counts,
            alone=not several,
            width=SEARCH_COLUMNS,
            num_warps=SEARCH_WARPS,
        )
        if shift >= 0:
            reduce_over_ranks(reached, ReduceOp.SUM, tp_group)
    return least


@triton.jit
def _maxima(logits, stride, columns, vocab_start, maxima, ids, width: tl.constexpr):
    """The largest score of each row, NaN if one is, and the first token that has it."""
    row = tl.program_id(0)
    lanes = tl.arange(0, width)
    largest = tl.full([width], -float("inf"), tl.float32)
    first = lanes
    for start in range(0, columns, width):
        at = start + lanes
        z = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < columns, other=-float("inf"))
        first = tl.where(z > largest, at, first)
        largest = tl.maximum(largest, z, propagate_nan=tl.PropagateNan.ALL)
    is_nan = tl.max((largest != largest).to(tl.int32), 0) > 0
    maximum = tl.max(largest, 0)
    tl.store(maxima + row, tl.where(is_nan, float("nan"), maximum))
    # Where a score is NaN the token is arbitrary, but there is one.
    column = tl.min(tl.where(largest == maximum, first, columns - 1), 0)
    tl.store(ids + row, (vocab_start + tl.minimum(column, columns - 1)).to(tl.int64))


@triton.jit
def _weights(z, maximum, factor):
    """fp32, whole numbers."""
    exponents = (z - maximum) * factor
    return tl.floor(tl.exp(tl.maximum(exponents, _LEAST_EXPONENT)) * _SCALE)


@triton.jit
def _numbers(weights):
    return tl.maximum(weights.to(tl.int32, bitcast=True) - _BEFORE_ONE, 0)


@triton.jit
def _sum_blocks(
    logits,
    stride,
    columns,
    maxima,
    factor,
    least,
    block_sums,
    shard_sums,
    has_least: tl.constexpr,
    width: tl.constexpr,
):
    """Sums of the weights of each block of columns, int64 ``[rows, blocks]``, and of all of the
    shard, fp64 ``[rows]``; NaN if a score is, or if the row's largest is not finite."""
    row = tl.program_id(0)
    maximum = tl.load(maxima + row)
    blocks = tl.cdiv(columns, _BLOCK)
    of_width: tl.constexpr = width // _BLOCK
    total = tl.zeros([of_width], tl.int64)
    nans = tl.zeros([of_width], tl.int32)
    for start in range(0, blocks, of_width):
        block = start + tl.arange(0, of_width)
        at = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None]
        z = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < columns, other=-float("inf"))
        weights = _weights(z, maximum, factor)
        if has_least:
            weights = tl.where(_numbers(weights) >= tl.load(least + row), weights, 0.0)
        sums = tl.sum(weights.to(tl.int64), 1)
        tl.store(block_sums + row.to(tl.int64) * blocks + block, sums, mask=block < blocks)
        total += sums
        nans += tl.sum((z != z).to(tl.int32), 1)
    is_sound = (tl.sum(nans, 0) == 0) & (maximum - maximum == 0)
    of_shard = tl.where(is_sound, tl.sum(total, 0).to(tl.float64), float("nan"))
    tl.store(shard_sums + row, of_shard)


@triton.jit
def _search(
    logits,
    stride,
    columns,
    maxima,
    factor,
    enough,
    least,
    reached,
    shift,
    counts: tl.constexpr,
    alone: tl.constexpr,
    width: tl.constexpr,
):
    """See ``_least_number``. alone: all of the search; else its bits from ``shift`` on, after those
    before are set by what all ranks have ``reached`` fp64 ``[rows, ways]``."""
    row = tl.program_id(0)
    scores = logits + row.to(tl.int64) * stride
    ways = tl.arange(0, _WAYS)
    maximum = tl.load(maxima + row)
    wanted = tl.load(enough + row)
    found = tl.load(least + row)
    if alone:
        for search in range(0, _FIRST_SHIFT // _BITS + 1):
            own_shift = _FIRST_SHIFT - search * _BITS
            here = _reached(scores, columns, maximum, factor, found, own_shift, counts, width)
            found = _narrowed(found, here, wanted, own_shift)
    else:
        cells = reached + row * _WAYS + ways
        if shift < _FIRST_SHIFT:
            found = _narrowed(found, tl.load(cells), wanted, shift + _BITS)
        if shift >= 0:
            here = _reached(scores, columns, maximum, factor, found, shift, counts, width)
            tl.store(cells, here)
    tl.store(least + row, found)


@triton.jit
def _reached(
    scores,
    columns,
    maximum,
    factor,
    found,
    shift,
    counts: tl.constexpr,
    width: tl.constexpr,
):
    """fp64 ``[ways]``: what the tokens weigh, or how many they are, whose number is at least
    ``found`` with each of the values that its bits from ``shift`` on can have."""
    bounds = found + (tl.arange(0, _WAYS) << shift)
    total = tl.zeros([_WAYS, width], tl.int64)
    for start in range(0, columns, width):
        at = start + tl.arange(0, width)
        z = tl.load(scores + at, mask=at < columns, other=-float("inf"))
        weights = _weights(z, maximum, factor)
        numbers = _numbers(weights)
        values = weights.to(tl.int64)
        if counts:
            values = (numbers > 0).to(tl.int64)
        total += tl.where(numbers[None] >= bounds[:, None], values[None], 0)
    return tl.sum(total, 1).to(tl.float64)


@triton.jit
def _narrowed(found, reached, wanted, shift):
    """``found`` with the largest value of its bits at ``shift`` that reaches what is wanted."""
    reaches = (reached >= wanted) & (tl.arange(0, _WAYS) > 0)
    return found + (tl.sum(reaches.to(tl.int32), 0) << shift)


@triton.jit
def _draw(
    logits,
    stride,
    columns,
    maxima,
    factor,
    least,
    block_sums,
    shard_sums,
    uniforms,
    drawn,
    rows,
    rank,
    vocab_start,
    has_least: tl.constexpr,
    ranks: tl.constexpr,
    most_blocks: tl.constexpr,
):
    """``drawn`` fp64 ``[4, rows]``: of the token that a row's uniform number falls on, if this
    shard holds it, else 0."""
    row = tl.program_id(0)
    before, total = _sum_of_shards(shard_sums + row, rows, rank, ranks)
    uniform = tl.load(uniforms + row)
    blocks = tl.cdiv(columns, _BLOCK)
    block = tl.arange(0, most_blocks)
    sums = tl.load(block_sums + row.to(tl.int64) * blocks + block, mask=block < blocks, other=0)
    # The token is the first column whose cumulative sum exceeds this whole number.
    target = tl.floor(uniform * total) - before
    own_sum = tl.sum(sums, 0)
    is_here = (target >= 0) & (target < own_sum.to(tl.float64))
    target = tl.where(is_here, target, 0.0).to(tl.int64)
    chosen = tl.sum((tl.cumsum(sums, 0) <= target).to(tl.int32), 0)
    chosen = tl.minimum(chosen, tl.maximum(blocks - 1, 0))
    target -= tl.sum(tl.where(block < chosen, sums, 0), 0)
    lanes = tl.arange(0, _BLOCK)
    at = chosen * _BLOCK + lanes
    z = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < columns, other=-float("inf"))
    weights = _weights(z, tl.load(maxima + row), factor)
    if has_least:
        weights = tl.where(_numbers(weights) >= tl.load(least + row), weights, 0.0)
    lane = tl.sum((tl.cumsum(weights.to(tl.int64), 0) <= target).to(tl.int32), 0)
    score = tl.sum(tl.where(lanes == lane, z, 0.0), 0)
    token = vocab_start + chosen * _BLOCK + lane
    tl.store(drawn + row, tl.where(is_here, token.to(tl.float64), 0.0))
    tl.store(drawn + rows + row, tl.where(is_here, score.to(tl.float64), 0.0))
    tl.store(drawn + 2 * rows + row, tl.where(is_here, uniform, 0.0))
    tl.store(drawn + 3 * rows + row, is_here.to(tl.float64))


@triton.jit
def _sum_of_shards(shard_sums, rows, rank, ranks: tl.constexpr):
    """(sum over the shards before ``rank``, sum over all), fp64."""
    before = tl.load(shard_sums) * 0.0
    total = before
    for shard in tl.static_range(ranks):
        own = tl.load(shard_sums + shard * rows)
        before += tl.where(shard < rank, own, 0.0)
        total += own
    return before, total


@triton.jit
def _tell(
    drawn,
    maxima,
    shard_sums,
    uniforms,
    tokens,
    log_probs,
    rows,
    factor,
    ranks: tl.constexpr,
    block: tl.constexpr,
):
    """The tokens, and their log-probs before ``top_k`` and ``top_p``; +inf where the ranks do not
    draw alike."""
    row = tl.program_id(0) * block + tl.arange(0, block)
    inside = row < rows
    total = tl.zeros([block], tl.float64)
    for shard in tl.static_range(ranks):
        total += tl.load(shard_sums + shard * rows + row, mask=inside, other=1.0)
    score = tl.load(drawn + rows + row, mask=inside, other=0.0)
    exponent = (score - tl.load(maxima + row, mask=inside, other=0.0)) * factor
    log_prob = exponent - tl.log(total / _SCALE)
    if ranks > 1:
        uniform = tl.load(drawn + 2 * rows + row, mask=inside, other=0.0)
        alike = uniform == tl.load(uniforms + row, mask=inside, other=0.0)
        alike = alike & (tl.load(drawn + 3 * rows + row, mask=inside, other=0.0) == 1)
        is_sound = log_prob - log_prob == 0
        log_prob = tl.where(alike | (is_sound == 0), log_prob, float("inf"))
    tl.store(log_probs + row, log_prob.to(tl.float32), mask=inside)
    tl.store(tokens + row, tl.load(drawn + row, mask=inside, other=0.0).to(tl.int64), mask=inside)
