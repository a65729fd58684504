"""Log-probabilities and entropies of tokens from hidden states, without holding the logits.

The language-model head multiplies [rows, hidden] by [vocab/tp, hidden]; at 8192 rows and a
vocabulary of 152k one fp32 copy of the result is 4.6 GiB, and autograd keeps several. Here rows are
taken in chunks: a chunk's scores [chunk_size, vocab/tp] are reduced to a few numbers per row, and
replaced by their gradient, at once. The vocabulary is never gathered: tensor-parallel
ranks exchange [rows]-sized statistics only.

With scores z, m = max z and Z = sum exp(z - m), all sums over the whole vocabulary,

    log p_y = z_y - (m + log Z)            H = log Z - (1/Z) sum exp(z - m) (z - m)
    d log p_y / dz_j = [j = y] - p_j

Padding columns (Megatron rounds the vocabulary up) are left out by slicing the weight: a zero row
would have score 0, not -inf. Scores are fp32 (fp64 for fp64 inputs) also where hidden states and
weight are bf16: scores rounded to bf16 move 2.7 % of tokens to another difficulty tier.

Tensor parallelism: ``hidden`` is the same on all ranks, so is every result, and the gradient of
``hidden`` is summed over the ranks here. Callers must not all-reduce it again: under sequence
parallelism gather the rows with
``gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)``.
"""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

from megatron_rmt.cpu import compiled
from megatron_rmt.model import head_compiled, head_plain
from megatron_rmt.model.head_products import (
    WeightedSums,
    in_range,
    multiply_scores,
    score_dtype,
    slices,
)

# loss(rows, log_probs [chunk]) -> losses [chunk] of these rows of the head.
LossOfRows = Callable[[slice, Tensor], Tensor]


def vocab_range(
    weight_rows: int, vocab_size: int, tp_group: ProcessGroup | None
) -> tuple[int, int]:
    """(first token id, number of ids) this rank holds, padding excluded; the number may be 0.

    Args:
        weight_rows: rows of this rank's shard of the (padded) head weight.
        vocab_size: the true vocabulary size, at most that of all shards together.
    """
    start = (0 if tp_group is None else tp_group.rank()) * weight_rows
    return start, max(0, min(weight_rows, vocab_size - start))


def reduce_over_ranks(values: Tensor, operation: Any, tp_group: ProcessGroup | None) -> Tensor:
    """``values``, all-reduced in place. Ranks have the same rows: all skip when there are none."""
    if tp_group is not None and tp_group.size() > 1 and values.numel() > 0:
        torch.distributed.all_reduce(values, op=operation, group=tp_group)
    return values


def of_all_ranks(values: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """[tp, ...]: ``values`` of every tensor-parallel rank, gathered unless there are none."""
    if tp_group is None or tp_group.size() == 1 or values.numel() == 0:
        return values[None]
    gathered = values.new_empty(tp_group.size() * len(values), *values.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, values.contiguous(), group=tp_group)
    return gathered.unflatten(0, (tp_group.size(), -1))


def first_with_maximum(ids: Tensor, maxima: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """[rows] the id, out of one per rank, whose score is the largest; the smallest of equals.

    Args:
        ids: [rows] int64. maxima: [rows], their scores on this rank.
    """
    if tp_group is None or tp_group.size() == 1:
        return ids
    overall = reduce_over_ranks(maxima.clone(), ReduceOp.MAX, tp_group)
    first = ids.masked_fill(maxima != overall, torch.iinfo(ids.dtype).max)
    return reduce_over_ranks(first, ReduceOp.MIN, tp_group)


def token_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: LossOfRows,
    *,
    vocab_size: int,
    tp_group: ProcessGroup | None,
    chunk_size: int,
    scale: Tensor | None = None,
    into_main_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """sum_i loss_i(log p(targets_i)), differentiable in hidden and weight, and the log-probs.

    All gradients are made in one pass of three matrix products: ``loss`` is differentiated chunk by
    chunk, as soon as the chunk's log-probabilities are known, and may be any function of them. The
    gradients are held from forward to backward, which may run once.

    Collectives: forward one MAX [chunk] and one SUM [3, chunk] for each chunk and one SUM of
    [rows, hidden]; backward none.

    Memory: scores [chunk_size, vocab/tp], and the fp32 gradients of ``hidden`` and ``weight``.
    Inputs are not modified.

    Args:
        hidden: [rows, hidden], fp32, bf16, fp16 or fp64; rows may be 0.
        weight: [padded vocab/tp, hidden], this rank's shard.
        targets: [rows] int64, token ids of the whole vocabulary.
        loss: ``loss(rows, log_probs)`` gives the losses [chunk] of these rows from their
            log-probabilities [chunk], fp32 (fp64 for fp64 inputs).
        vocab_size: the true vocabulary size, padding excluded.
        tp_group: the tensor-parallel group; None for a single process.
        chunk_size: rows whose scores are held at a time.
        scale: [rows], a constant factor of each row's scores (1 / temperature); None for 1.
        into_main_grad: add the gradient of ``weight``, a parameter with Megatron's ``main_grad``,
            to that, as its fused linear layers do, without rounding it to the dtype of the weight.

    Returns:
        (sum [], log_probs [rows]), nats, fp32 (fp64 for fp64 inputs); only the sum is
        differentiable. Gradients come in the dtypes of the inputs; sums over rows are made in fp32.

    A target outside [0, vocab_size) is no token. On the CPU it raises; on a GPU, where looking
    would wait for the device, its log-probability is NaN, and so is the sum.

    Raises:
        ValueError: a target outside [0, vocab_size), on the CPU.
    """
    if not targets.is_cuda and targets.numel() > 0:
        lowest, highest = (int(bound) for bound in targets.aminmax())
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(
                f"targets holds {lowest if lowest < 0 else highest}, not in [0, {vocab_size}); "
                "leave out rows without a target."
            )
    shard = _Shard.of(weight, vocab_size, tp_group, chunk_size)
    scale = None if scale is None else scale.detach().to(score_dtype(hidden, weight))
    grads = torch.is_grad_enabled()
    return _TokenLossSum.apply(hidden, weight, targets, loss, scale, shard, grads, into_main_grad)


@torch.no_grad()
def token_entropies(
    hidden: Tensor,
    weight: Tensor,
    *,
    vocab_size: int,
    tp_group: ProcessGroup | None,
    chunk_size: int,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Entropy and most probable token of each row, without gradient.

    Collectives: two MAX and one MIN of [rows] and one SUM of [3, rows]; with ``top_k`` an
    all-gather of [rows, top_k] in place of the SUM and one MAX. Any number of chunks.

    Args:
        top_k: entropy of the ``top_k`` largest probabilities, renormalised (RPT, arXiv 2506.08007,
            takes 16); None for the whole vocabulary.
        others: as for ``token_loss_sum``.

    Returns:
        (entropies [rows] fp32 in nats, argmax ids [rows] int64, the smallest id of equals).
    """
    shard = _Shard.of(weight, vocab_size, tp_group, chunk_size)
    sweeps = _sweeps(hidden, weight, shard)
    rows, dtype = hidden.shape[0], score_dtype(hidden, weight)
    count = 1 if top_k is None else min(top_k, vocab_size)
    statistics = hidden.new_empty(4, rows, dtype=dtype)
    largest = hidden.new_full((rows, count), torch.finfo(dtype).min, dtype=dtype)
    best = torch.full((rows,), vocab_size, dtype=torch.int64, device=hidden.device)
    for chunk, scores in _score_chunks(hidden, weight, None, shard):
        if shard.columns > 0:
            best[chunk] = scores.argmax(-1) + shard.start
        if top_k is None:
            statistics[:, chunk] = sweeps.statistics_(scores, None)
        else:
            values = scores.topk(min(count, shard.columns), sorted=False).values
            largest[chunk, : values.shape[1]] = values
    if top_k is not None:
        argmax_ids = first_with_maximum(best, largest.amax(-1), tp_group)
        return _entropy_of_largest(largest, shard), argmax_ids
    argmax_ids = first_with_maximum(best, statistics[0], tp_group)
    return _combine(statistics, shard)[2], argmax_ids


class _Shard(NamedTuple):
    """This rank's part of the vocabulary, [start, start + columns), and how to go through it."""

    start: int
    columns: int
    vocab_size: int
    group: ProcessGroup | None
    chunk_size: int

    @classmethod
    def of(
        cls, weight: Tensor, vocab_size: int, tp_group: ProcessGroup | None, chunk_size: int
    ) -> "_Shard":
        start, columns = vocab_range(weight.shape[0], vocab_size, tp_group)
        return cls(start, columns, vocab_size, tp_group, chunk_size)


def _sweeps(hidden: Tensor, weight: Tensor, shard: _Shard) -> ModuleType:
    """Which of ``head_plain``, ``head_compiled`` and ``head_triton`` goes over the scores."""
    if score_dtype(hidden, weight) != torch.float32 or shard.columns == 0:
        return head_plain
    if hidden.is_cuda:
        return _triton_sweeps()
    return head_compiled if hidden.device.type == "cpu" and compiled.is_available() else head_plain


@functools.cache
def _triton_sweeps() -> ModuleType:
    try:
        from megatron_rmt.model import head_triton
    except ImportError:  # there is no Triton
        return head_plain
    return head_triton


def _score_chunks(
    hidden: Tensor, weight: Tensor, scale: Tensor | None, shard: _Shard
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, scores [chunk, columns]) of each chunk; the scores are overwritten by the next."""
    rows = hidden.shape[0]
    # Rows as long as the padded shard, of which padding is cut: a GPU wants them aligned.
    held = hidden.new_empty(
        min(rows, shard.chunk_size), weight.shape[0], dtype=score_dtype(hidden, weight)
    )
    for chunk in slices(rows, shard.chunk_size):
        scores = held[: chunk.stop - chunk.start, : shard.columns]
        own, own_scale = hidden[chunk], None if scale is None else scale[chunk, None]
        if own_scale is not None and hidden.dtype == scores.dtype:
            own, own_scale = own * own_scale, None  # cheaper, and as exact, before the product
        multiply_scores(own, weight[: shard.columns], scores)
        yield chunk, scores if own_scale is None else scores.mul_(own_scale)


def _combine(statistics: Tensor, shard: _Shard) -> tuple[Tensor, Tensor, Tensor]:
    """(log-normaliser, log-prob of the target, entropy) [rows] of the whole vocabulary.

    The entropy means nothing where the moment was not taken.

    Args:
        statistics: [4, rows] of this rank, from ``statistics_``. Overwritten, but not the maxima.
    """
    maxima, normaliser, moment, target_score = statistics
    overall = reduce_over_ranks(maxima.clone(), ReduceOp.MAX, shard.group)
    shift = maxima - overall
    moment.addcmul_(normaliser, shift)
    statistics[1:3] *= shift.exp()
    reduce_over_ranks(statistics[1:], ReduceOp.SUM, shard.group)
    log_normaliser = overall + normaliser.log()
    # Never negative, without a clamp: the normaliser is at least 1, the moment at most 0.
    entropies = normaliser.log() - moment / normaliser
    return log_normaliser, target_score - log_normaliser, entropies


def _entropy_of_largest(largest: Tensor, shard: _Shard) -> Tensor:
    """[rows] entropy of the k largest scores among all ranks; ``largest`` is [rows, k] of this."""
    of_ranks = of_all_ranks(largest, shard.group)
    if len(of_ranks) > 1:
        of_ranks = of_ranks.transpose(0, 1).flatten(1)
        largest = of_ranks.topk(largest.shape[1], sorted=False).values
    probabilities = largest.softmax(-1)
    # torch.special.entr is the same, but a GPU compiles it when it is first called.
    return -torch.xlogy(probabilities, probabilities).sum(-1)


class _TokenLossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss: LossOfRows,
        scale: Tensor | None,
        shard: _Shard,
        with_gradients: bool,
        into_main_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        sweeps = _sweeps(hidden, weight, shard)
        columns = targets - shard.start
        is_held = (columns >= 0) & (columns < shard.columns)
        is_token = (targets >= 0) & (targets < shard.vocab_size)
        columns = columns.clamp(0, max(0, shard.columns - 1))
        log_probs = hidden.new_empty(hidden.shape[0], dtype=score_dtype(hidden, weight))
        total = log_probs.new_zeros(())
        needed = tuple(with_gradients and needs for needs in ctx.needs_input_grad[:2])
        gradients = WeightedSums(hidden, weight, shard.columns, needed)
        for chunk, scores in _score_chunks(hidden, weight, scale, shard):
            targeted = columns[chunk], is_held[chunk]
            statistics = sweeps.statistics_(scores, targeted)
            log_normaliser, found, _ = _combine(statistics, shard)
            log_probs[chunk] = found.where(is_token[chunk], torch.nan)
            if not any(needed):
                total += loss(chunk, log_probs[chunk]).sum()
                continue
            own, by_log_prob = _differentiate(loss, chunk, log_probs[chunk])
            total += own
            if scale is not None:
                # d/d(h.w) = scale * d/d(scaled score).
                by_log_prob = by_log_prob * scale[chunk]
            score_gradient = gradients.memory_for(scores)
            by_log_prob, undo = in_range(by_log_prob, score_gradient.dtype)
            sweeps.gradient_(
                scores, statistics[0], log_normaliser, by_log_prob, targeted, score_gradient
            )
            gradients.add(chunk, score_gradient, undo)
        if gradients.hidden is not None:
            # Each rank knows what its own columns give.
            reduce_over_ranks(gradients.hidden, ReduceOp.SUM, shard.group)
        ctx.gradients = gradients.hidden, gradients.weight
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.fused = weight if into_main_grad else None
        ctx.mark_non_differentiable(log_probs)
        return total, log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_sum: Tensor, *_: Any) -> tuple:
        if ctx.gradients is None:
            raise RuntimeError(
                "token_loss_sum: backward ran a second time, but the gradients that the forward "
                "pass made were given away; run the forward pass again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        by_hidden, by_weight = (
            None if gradient is None else gradient.mul_(by_sum) for gradient in gradients
        )
        if by_weight is not None and ctx.fused is not None:
            ctx.fused.main_grad.add_(by_weight)
            ctx.fused.grad_added_to_main_grad = True
            # Of no meaning: that there is one tells Megatron that the parameter's is complete.
            by_weight = by_weight.new_empty(1, dtype=ctx.dtypes[1]).expand(by_weight.shape)
        by_inputs = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip((by_hidden, by_weight), ctx.dtypes, strict=True)
        )
        return *by_inputs, None, None, None, None, None, None


def _differentiate(loss: LossOfRows, rows: slice, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """(sum [] of the losses of ``rows``, its derivative by ``log_probs`` [chunk])."""
    with torch.enable_grad():
        log_probs = log_probs.detach().requires_grad_()
        total = loss(rows, log_probs).sum()
        (derivative,) = torch.autograd.grad(total, log_probs)
    return total.detach(), derivative
