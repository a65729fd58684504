"""The functions of ``head_plain`` for fp32 scores on a GPU, each a kernel that reads them once.

Imported only where the scores are on a GPU. Their arithmetic is tested against float64 under
Triton's interpreter, on a CPU; their speed, and that they compile, is unverified on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rmt.model.head_plain import Targets

# Columns that one program holds at a time.
_STATISTICS_BLOCK = 4096
_GRADIENT_BLOCK = 2048
_WARPS = 8


def statistics_(scores: Tensor, targets: Targets | None) -> Tensor:
    """As ``head_plain``'s; ``scores`` [rows, columns] stay what they are."""
    rows, columns = scores.shape
    result = scores.new_zeros(4, rows)
    target_columns, held = targets or _no_targets(scores)
    block = min(_STATISTICS_BLOCK, triton.next_power_of_2(columns))
    _statistics[(rows,)](
        scores,
        scores.stride(0),
        columns,
        target_columns,
        held,
        result,
        rows,
        block=block,
        num_warps=_WARPS,
    )
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
    rows, columns = scores.shape
    block = min(_GRADIENT_BLOCK, triton.next_power_of_2(columns))
    _gradient[(rows, triton.cdiv(columns, block))](
        scores,
        scores.stride(0),
        out,
        out.stride(0),
        columns,
        log_normaliser.contiguous(),
        by_log_prob.contiguous(),
        *(target.contiguous() for target in targets),
        block=block,
        num_warps=_WARPS,
    )


def _no_targets(scores: Tensor) -> Targets:
    columns = torch.zeros(scores.shape[0], dtype=torch.int64, device=scores.device)
    return columns, columns.bool()


# Loads are masked by the stride, which is padded and so a multiple of 16, where the number of
# columns (tokens of a vocabulary) may be odd: so they read 16 bytes each. What lies behind the
# columns may be anything.


@triton.jit
def _statistics(scores, stride, columns, targets, held, result, rows, block: tl.constexpr):
    """One program per row; ``result`` [4, rows]: m, Z, sum exp(z - m) (z - m), target's z."""
    row = tl.program_id(0)
    first = scores + row.to(tl.int64) * stride
    lanes = tl.arange(0, block)
    # The first block is apart, so that m is never infinite: 0 * inf would be NaN.
    inside = lanes < columns
    z = tl.load(first + lanes, mask=lanes < stride, other=0.0)
    z = tl.where(inside, z, -float("inf"))
    maximum = tl.max(z, 0)
    exponentials = tl.exp(z - maximum)
    normaliser = tl.sum(exponentials, 0)
    moment = tl.sum(tl.where(inside, exponentials * (z - maximum), 0.0), 0)
    for start in range(block, columns, block):
        inside = start + lanes < columns
        z = tl.load(first + start + lanes, mask=start + lanes < stride, other=0.0)
        z = tl.where(inside, z, -float("inf"))
        higher = tl.maximum(maximum, tl.max(z, 0))
        shift = maximum - higher
        shrunk = tl.exp(shift)
        exponentials = tl.exp(z - higher)
        moment = shrunk * (moment + normaliser * shift)
        moment += tl.sum(tl.where(inside, exponentials * (z - higher), 0.0), 0)
        normaliser = shrunk * normaliser + tl.sum(exponentials, 0)
        maximum = higher
    tl.store(result + row, maximum)
    tl.store(result + rows + row, normaliser)
    tl.store(result + 2 * rows + row, moment)
    target = tl.load(targets + row)
    is_held = tl.load(held + row) != 0
    of_target = tl.load(first + target, mask=is_held, other=0.0)
    tl.store(result + 3 * rows + row, of_target)


@triton.jit
def _gradient(
    scores,
    stride,
    out,
    out_stride,
    columns,
    log_normaliser,
    by_log_prob,
    targets,
    held,
    block: tl.constexpr,
):
    """One program per row and block of columns; 0 behind the columns of a row of ``out``."""
    row = tl.program_id(0)
    lanes = tl.program_id(1) * block + tl.arange(0, block)
    inside = lanes < columns
    z = tl.load(scores + row.to(tl.int64) * stride + lanes, mask=lanes < stride, other=0.0)
    log_p = z - tl.load(log_normaliser + row)
    weight = tl.load(by_log_prob + row)
    at_target = (lanes == tl.load(targets + row)) & (tl.load(held + row) != 0)
    gradient = tl.where(at_target, weight, 0.0) - tl.exp(log_p) * weight
    gradient = tl.where(inside, gradient, 0.0).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * out_stride + lanes, gradient, mask=lanes < out_stride)
