"""Sweeps over one chunk of the head's scores: what each row yields, and its gradient in place.

Pure maths on one rank's columns, no collective. Notation as in ``head``: scores z, m = max z,
Z = sum exp(z - m). Of this form there are two faster ones with the same functions, for fp32 scores
and at least one column: ``head_compiled`` on a CPU, ``head_triton`` on a GPU. Here a few rows at a
time go through all steps, so that they find the rows in the cache.
"""

import torch
from torch import Tensor

from megatron_rmt.model.head_products import slices

# Scores that one step works on: 512 KiB of fp32 leave room in a core's level-2 cache for a second
# block; a GPU wants few launches.
_CPU_BLOCK = 1 << 17
_GPU_BLOCK = 1 << 23

# ([rows] column of each target, clamped into the rank's columns; [rows] bool, whether it is there).
Targets = tuple[Tensor, Tensor]


def statistics_(scores: Tensor, targets: Targets | None) -> Tensor:
    """[4, rows] over this rank's columns: m, Z, sum exp(z - m) (z - m), and z of the target.

    Args:
        scores: [rows, columns] fp32 or fp64, left as ``gradient_`` takes them, here exp(z - m);
            columns may be 0: then m is the least finite number and the sums are 0.
        targets: with them the third row may be 0, as only entropies need it; None: the fourth is 0,
            and the scores are of no more use.
    """
    result = with_target_scores(scores, targets)
    if scores.shape[1] == 0:
        return result
    memory = scores.new_empty(_block_rows(scores), scores.shape[1]) if targets is None else None
    for block in slices(len(scores), _block_rows(scores)):
        maxima, normaliser, moment = result[:3, block]
        rows = scores[block]
        torch.amax(rows, -1, out=maxima)
        rows.sub_(maxima[:, None])
        exponentials = torch.exp(rows, out=rows if memory is None else memory[: len(rows)])
        torch.sum(exponentials, -1, out=normaliser)
        if memory is not None:
            torch.sum(rows.mul_(exponentials), -1, out=moment)
    return result


def gradient_(
    scores: Tensor,
    maxima: Tensor,
    log_normaliser: Tensor,
    by_log_prob: Tensor,
    targets: Targets,
    out: Tensor,
) -> None:
    """The gradient by the scores of a log p_target, into ``out``: a ([j = target] - p_j).

    Args:
        scores: [rows, columns], as ``statistics_`` left them; overwritten.
        maxima: [rows], m of this rank.
        log_normaliser: [rows], m + log Z of the whole vocabulary.
        by_log_prob: [rows], a.
        targets: as given to ``statistics_``.
        out: [rows, columns], may be ``scores`` itself; rounded to its dtype. What its rows have
            behind the columns may be overwritten, by zeros.
    """
    # One factor per row makes exp(z - m) to p.
    to_p = torch.exp(maxima - log_normaliser)
    scores.mul_((-by_log_prob * to_p)[:, None])
    columns, held = targets
    if scores.shape[1] > 0:
        scores.scatter_add_(1, columns[:, None], (by_log_prob * held)[:, None])
    if out is not scores:
        out.copy_(scores)


def with_target_scores(scores: Tensor, targets: Targets | None) -> Tensor:
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
    return min(scores.shape[0], max(1, size // scores.shape[1]))
