"""The functions of ``head_plain`` for fp32 scores on a CPU, each one compiled loop over memory."""

import torch
from torch import Tensor

from megatron_rmt.cpu.compiled import fused
from megatron_rmt.model.head_plain import Targets, with_target_scores


def statistics_(scores: Tensor, targets: Targets | None) -> Tensor:
    """As ``head_plain``'s; ``scores`` [rows, columns] stay what they are."""
    result = with_target_scores(scores, targets)
    for row, sums in enumerate(_row_statistics(scores)):
        result[row] = sums
    return result


def gradient_(
    scores: Tensor,
    maxima: Tensor,
    log_normaliser: Tensor,
    by_log_prob: Tensor,
    targets: Targets,
    out: Tensor,
) -> None:
    """As ``head_plain``'s."""
    columns, held = targets
    p_target = (scores.gather(1, columns[:, None])[:, 0] - log_normaliser).exp()
    _write_gradient(scores, log_normaliser, by_log_prob, out)
    # Indexed, as scatter_ copies all of a bf16 tensor.
    at = torch.arange(len(out), device=out.device), columns
    at_target = by_log_prob - p_target * by_log_prob
    out[at] = torch.where(held, at_target.to(out.dtype), out[at])


@fused
def _row_statistics(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    maxima = scores.amax(-1)
    shifted = scores - maxima[:, None]
    exponentials = shifted.exp()
    return maxima, exponentials.sum(-1), (exponentials * shifted).sum(-1)


@fused
def _write_gradient(
    scores: Tensor, log_normaliser: Tensor, by_log_prob: Tensor, out: Tensor
) -> None:
    """``gradient_`` but for what it has at the targets."""
    out.copy_(-(scores - log_normaliser[:, None]).exp() * by_log_prob[:, None])
