"""Rollouts and update must agree on the log-prob of every drawn token.

Both read the same weights through the same modules, so only rounding may differ: the order of sums
in fp32, and the rounding of every activation in half precision. A larger difference means that the
policy that is trained is not the one that was sampled, and its gradient is wrong.
"""

from argparse import Namespace
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rmt.update.forward_step import Update

# Mean over a step's tokens, in nats. A rotary position that is off by one, a stale weight or a
# wrong mask give 0.1 and more. Rounding gives 1e-6 in fp32, and in bf16, which keeps 8 bits, 0.01
# to 0.04 (SmolLM2-135M): about a factor of ten is left for deeper and wider models.
FP32_TOLERANCE = 1e-3
HALF_PRECISION_TOLERANCE = 0.2


def logprob_tolerance(args: Namespace) -> float:
    """``--rmt-logprob-tolerance``, or the default for the precision."""
    if args.rmt_logprob_tolerance is not None:
        return args.rmt_logprob_tolerance
    return FP32_TOLERANCE if args.params_dtype == torch.float32 else HALF_PRECISION_TOLERANCE


def check_log_probs(updates: Sequence[Update], tolerance: float) -> None:
    """Compare the mean |difference| of all ranks' tokens with ``tolerance``.

    Collective over all ranks; each raises, or none.

    Raises:
        RuntimeError: the difference is larger, or not a number.
    """
    device = updates[0].tree.tokens.device
    total = torch.stack([update.difference.to(device) for update in updates]).sum(0)
    # A sum would lose a NaN nowhere, but tell it apart from a large one in the message only.
    dist.all_reduce(total)
    mean = float(total[0] / total[1].clamp(min=1))
    if not mean <= tolerance:
        raise RuntimeError(
            f"RMT: log-probs of the update differ from those of the rollouts by {mean:.3g} nats on "
            f"average, more than --rmt-logprob-tolerance {tolerance:g}; the optimizer's step was "
            "not taken. Either the weights are not finite, or something acts on training alone or "
            "on generation alone: look at dropout, at code of the job that depends on "
            "model.training or on position ids, at quantized weights that are not refreshed, and "
            "at routers of the job's own that drop tokens or draw noise; raise the tolerance only "
            "if the difference is rounding ('rmt logprob difference' in the log, small and steady)."
        )
