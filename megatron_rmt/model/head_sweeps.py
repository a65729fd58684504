"""Sweeps over one chunk of the head's scores: what each row yields, and its gradient in place.

Pure maths on one rank's columns, no collective. Notation as in ``head``: scores z, m = max z,
Z = sum exp(z - m). A sweep is one compiled loop on a CPU (``cpu.compiled``), a Triton kernel of
``head_triton`` on a GPU. Where neither can be, it takes a few rows at a time through all its
steps, so that they find the rows in the cache.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_rmt.cpu import compiled
from megatron_rmt.cpu.compiled import fused

# Scores that one step works on: 512 KiB of fp32 leave room in a core's level-2 cache for a second
# block; a GPU wants few launches.
_CPU_BLOCK = 1 << 17
_GPU_BLOCK = 1 << 23

Targets = tuple[Tensor, Tensor]


def target_columns(targets: Tensor, start: int, columns: int) -> Targets:
    """([rows] column of each target, clamped into [0, columns); [rows] bool, whether it is there).

    Args:
        start: token id of this rank's first column.
    """
    own = targets - start
    return own.clamp(0, max(0, columns - 1)), (own >= 0) & (own < columns)


def statistics(scores: Tensor, targets: Targets | None) -> Tensor:
    """[4, rows] over this rank's columns: m, Z, sum exp(z - m) (z - m), and z of the target or 0.

    Args:
        scores: [rows, columns] fp32 or fp64, not modified; columns may be 0: then m is the least
            finite number and the sums are 0.
        targets: from ``target_columns``; None yields 0.
    """
    kernels = _kernels(scores)
    if kernels is not None:
        return kernels.statistics(scores, targets)
    result = _with_target_scores(scores, targets)
    if scores.shape[1] == 0:
        return result
    if _is_compiled(scores):
        for row, sums in enumerate(_row_statistics(scores)):
            result[row] = sums
        return result
    shifted, exponentials = scores.new_empty(2, _block_rows(scores), scores.shape[1])
    for block in _row_blocks(scores):
        maxima, normaliser, moment = result[:3, block]
        rows = scores[block]
        x, y = shifted[: len(rows)], exponentials[: len(rows)]
        torch.amax(rows, -1, out=maxima)
        torch.sub(rows, maxima[:, None], out=x)
        torch.exp(x, out=y)
        torch.sum(y, -1, out=normaliser)
        torch.sum(x.mul_(y), -1, out=moment)
    return result


@fused
def _row_statistics(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    maxima = scores.amax(-1)
    shifted = scores - maxima[:, None]
    exponentials = shifted.exp()
    return maxima, exponentials.sum(-1), (exponentials * shifted).sum(-1)


def exponentiate_(scores: Tensor, targets: Targets | None) -> Tensor:
    """As ``statistics`` without the moment (its row is 0), and ``scores`` become exp(z - m)."""
    result = _with_target_scores(scores, targets)
    if scores.shape[1] == 0:
        return result
    for block in _row_blocks(scores):
        maxima, normaliser = result[:2, block]
        rows = scores[block]
        torch.amax(rows, -1, out=maxima)
        rows.sub_(maxima[:, None]).exp_()
        torch.sum(rows, -1, out=normaliser)
    return result


def score_gradient_(
    scores: Tensor, log_normaliser: Tensor, by_log_prob: Tensor, targets: Targets, out: Tensor
) -> None:
    """The gradient by ``scores`` of a log p_target, into ``out``; fused sweeps only.

    d/dz_j = a ([j = target] - p_j), p = exp(z - log-normaliser).

    Args:
        scores: [rows, columns], overwritten.
        log_normaliser: [rows], m + log Z of the whole vocabulary.
        by_log_prob: [rows], a.
        targets: from ``target_columns``.
        out: [rows, columns], may be ``scores`` itself; rounded to its dtype.
    """
    kernels = _kernels(scores)
    if kernels is not None:
        kernels.score_gradient_(scores, log_normaliser, by_log_prob, targets)
        if out is not scores:
            out.copy_(scores)
        return
    of_target = scores.gather(1, targets[0][:, None])[:, 0] - log_normaliser
    _write_gradient(scores, log_normaliser, by_log_prob, out)
    _set_at_targets_(out, by_log_prob - of_target.exp() * by_log_prob, targets)


@fused
def _write_gradient(
    scores: Tensor, log_normaliser: Tensor, by_log_prob: Tensor, out: Tensor
) -> None:
    """``score_gradient_`` but for what it has at the targets."""
    out.copy_(-(scores - log_normaliser[:, None]).exp() * by_log_prob[:, None])


def add_at_targets_(scores: Tensor, values: Tensor, targets: Targets) -> None:
    """Add ``values`` [rows] at each row's target, where this rank has it."""
    columns, held = targets
    if scores.shape[1] > 0:
        scores.scatter_add_(1, columns[:, None], (values * held)[:, None])


def _set_at_targets_(out: Tensor, values: Tensor, targets: Targets) -> None:
    """Put ``values`` [rows] at each row's target, where this rank has it."""
    columns, held = targets
    # Indexed, as scatter_ copies all of a bf16 tensor.
    at = torch.arange(len(out), device=out.device), columns
    out[at] = torch.where(held, values.to(out.dtype), out[at])


def is_fused(scores: Tensor) -> bool:
    """Whether a sweep reads ``scores`` from memory once: compiled, or as a Triton kernel."""
    return _kernels(scores) is not None or _is_compiled(scores)


def _is_compiled(scores: Tensor) -> bool:
    wanted = scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.numel() > 0
    return wanted and compiled.is_available()


def _with_target_scores(scores: Tensor, targets: Targets | None) -> Tensor:
    """[4, rows]: 0 but for the scores of the targets, and m where there are no columns."""
    result = scores.new_zeros(4, scores.shape[0])
    if scores.shape[1] == 0:
        result[0] = torch.finfo(scores.dtype).min  # finite: 0 * -inf would be NaN
    elif targets is not None:
        columns, held = targets
        torch.mul(scores.gather(1, columns[:, None])[:, 0], held, out=result[3])
    return result


def _block_rows(scores: Tensor) -> int:
    size = _GPU_BLOCK if scores.is_cuda else _CPU_BLOCK
    return min(scores.shape[0], max(1, size // max(1, scores.shape[1])))


def _row_blocks(scores: Tensor) -> Iterator[slice]:
    rows, step = scores.shape[0], max(1, _block_rows(scores))
    return (slice(first, min(rows, first + step)) for first in range(0, rows, step))


def _kernels(scores: Tensor) -> Any:
    """The module of Triton kernels for scores on a GPU, if there is a Triton; else None."""
    if not scores.is_cuda or scores.dtype != torch.float32 or scores.numel() == 0:
        return None
    return _import_kernels()


@functools.cache
def _import_kernels() -> Any:
    try:
        from megatron_rmt.model import head_triton
    except ImportError:
        return None
    return head_triton
