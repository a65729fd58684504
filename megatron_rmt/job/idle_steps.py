"""Steps whose rollouts teach nothing: said when it happens first, counted from then on."""

import warnings
from collections import Counter

import torch.distributed as dist


def note_idle_step(counts: Counter[str], reason: str | None, iteration: int) -> None:
    """Count an idle step, and warn on rank 0 of the first, the 10th, the 100th and so on.

    counts: of this process, by reason. reason: None for a step that is not idle. iteration: 0 for
    the first step.
    """
    if reason is None:
        return
    counts[reason] += 1
    digits = str(counts[reason])
    if dist.get_rank() == 0 and digits == "1" + "0" * (len(digits) - 1):
        warnings.warn(
            f"RMT, iteration {iteration + 1}: {reason}; {digits} such step(s) since the start, "
            "which train on next tokens at most (told again at ten times as many).",
            stacklevel=2,
        )
