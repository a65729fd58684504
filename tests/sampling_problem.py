"""Arguments of ``sample_tokens`` that reach its edges."""

import torch
from torch import Tensor

from megatron_rmt.algorithm.rng import uniforms


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Scores fp32 with ties, vanishing ones and -inf, whose rows are not dense, and their numbers
    fp64, with both ends of what there is."""
    generator = torch.Generator().manual_seed(rows + columns)
    logits = (4 * torch.randn(rows, columns + 3, generator=generator))[:, :columns]
    logits[-1] = logits[-1].round()
    logits[0, columns // 2 :] -= 60 * (columns > 1)
    logits[rows // 2, : columns * 2 // 3] = -torch.inf
    # The largest in the last pass of a program.
    logits[1 % rows, -2:-1] = logits[1 % rows].amax() + (rows > 1)
    # At temperature 0.8 the last token has the least weight that there is, which the largest number
    # falls on.
    logits[-1, -1] = logits[-1].amax() - 18.6 * (columns > 1)
    numbers = uniforms(3, 0, 0, 0, torch.arange(rows), columns)
    numbers[-1] = 1 - 2.0**-53
    # Where whole blocks lie before the first token that may be drawn, too.
    numbers[rows // 2] = 0.0
    return logits, numbers
