"""The last look before the optimizer's step: finite numbers, and log-probs as they were drawn.

Rollouts and update must agree on the log-prob of every drawn token.

Both read the same weights through the same modules, so only rounding may differ: the order of sums
in fp32, and the rounding of every activation in half precision. A larger difference means that the
policy that is trained is not the one that was sampled, and its gradient is wrong.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from megatron_rmt.update.agreement import NotFiniteError
from megatron_rmt.update.forward_step import Update
from megatron_rmt.update.tree import place_of_prediction

# Mean over a step's tokens, in nats. A rotary position that is off by one, a stale weight or a
# wrong mask give 0.1 and more. Rounding gives 1e-6 in fp32, and in bf16, which keeps 8 bits, 0.01
# to 0.04 (SmolLM2-135M): about a factor of ten is left for deeper and wider models.
FP32_TOLERANCE = 1e-3
HALF_PRECISION_TOLERANCE = 0.2


class LogProbsDifferError(RuntimeError):
    """The policy that is trained is not the one that was sampled."""


def logprob_tolerance(args: Namespace) -> float:
    """``--rmt-logprob-tolerance``, or the default for the precision."""
    if args.rmt_logprob_tolerance is not None:
        return args.rmt_logprob_tolerance
    return FP32_TOLERANCE if args.params_dtype == torch.float32 else HALF_PRECISION_TOLERANCE


def check_log_probs(
    updates: Sequence[Update], tolerance: float, gradients: Mapping[str, Tensor] | None = None
) -> None:
    """Compare the mean |difference| of all ranks' tokens with ``tolerance``; refuse what is not
    finite: a log-prob, a loss, the norm of ``gradients``.

    gradients: of this rank, by name, with those of all ranks summed up already. Collective over all
    ranks; each raises, or none. Waits for the device once.

    Raises:
        LogProbsDifferError: the difference is larger, or not a number.
        NotFiniteError: another number is not finite; names its sample, or the parameter.
    """
    device = updates[0].tree.tokens.device
    outputs = [update.output for update in updates if update.output is not None]
    norm = get_total_norm((gradients or {}).values()).to(device)
    broken = [(~output.isfinite()).sum() for output in outputs] + [~norm.isfinite()]
    total = torch.stack([update.difference.to(device) for update in updates]).sum(0)
    counts = torch.stack(broken).sum()[None].to(total.dtype)
    total = torch.cat([total, counts])
    dist.all_reduce(total)
    difference, tokens, not_finite = total.tolist()
    if not_finite:
        found = [_not_finite(updates, gradients or {})] * dist.get_world_size()
        if len(found) > 1:
            dist.all_gather_object(found, found[0])
        raise NotFiniteError(next(text for text in found if text))
    # Nothing may have been drawn; then there is nothing to compare.
    mean = difference / max(tokens, 1.0)
    if not mean <= tolerance:
        raise LogProbsDifferError(
            f"log-probs of the update differ from those of the rollouts by {mean:.3g} nats on "
            f"average, more than --rmt-logprob-tolerance {tolerance:g}; the optimizer's step was "
            "not taken. Either the weights are not finite, or something acts on training alone or "
            "on generation alone: look at dropout, at code of the job that depends on "
            "model.training or on position ids, at quantized weights that are not refreshed, and "
            "at routers of the job's own that drop tokens or draw noise; raise the tolerance only "
            "if the difference is rounding ('rmt logprob difference' in the log, small and steady)."
        )


def _not_finite(updates: Sequence[Update], gradients: Mapping[str, Tensor]) -> str:
    """What of this rank is not finite, in words; empty if all is."""
    for update in updates:
        if update.output is None:
            continue
        broken = (~update.output[1:].isfinite()).nonzero()
        if len(broken):
            place = place_of_prediction(update.tree, update.reasoned, int(broken[0]))
            return f"the log-prob of {place} is not finite in the update"
        if not update.output[0].isfinite():
            return "the loss is not finite, though all log-probs are: look at --rmt-loss"
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            return f"the gradient of {name} is not finite, though all log-probs are"
    if not get_total_norm(gradients.values()).isfinite():
        return "the norm of the gradients is not finite, though all log-probs and gradients are"
    return ""
