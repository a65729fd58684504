"""The hybrid loss: ``L_GRPO(chosen tokens) + lambda * L_NTP(all others)`` (RMT, arXiv 2509.24375).

Both parts are weighted sums of log-probs whose weights are known before the update and already
hold the global means, so that the loss does not depend on how samples are split over micro-batches
and data-parallel ranks.

Normalisation is not given by the paper; ours: L_GRPO is GRPO's own (mean over a response's drawn
tokens, mean over the group), mean over the chosen positions of the global batch; L_NTP is the mean
over the other unmasked tokens of the global batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossWeights:
    """Weight of each prediction's log-prob in the loss of one micro-batch, all fp32.

    ntp: ``[trunk predictions]``, loss mask / unmasked tokens of the global batch. policy:
    ``[response predictions]``, advantage / (drawn tokens of the response * group * positions of the
    global batch). supervised: ``[response predictions]``, the format warm-up's weights.
    """

    ntp: Tensor
    policy: Tensor
    supervised: Tensor


def response_weights(
    values: Tensor, rollouts: Tensor, selected: Tensor, *, positions: float
) -> Tensor:
    """Share ``values`` ``[rollouts]`` out over the ``selected`` tokens of each rollout.

    rollouts: ``[predictions]`` int64, which rollout each predicted token belongs to. selected:
    ``[predictions]`` bool. positions: rollouts' groups times group size in the *global* batch.
    Returns fp32 (fp64 for fp64 values) ``[predictions]``: value / (selected tokens of the rollout *
    positions), else 0.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    chosen = selected.to(values.dtype)
    counts = torch.zeros_like(values).index_add_(0, rollouts, chosen)
    per_token = values / counts.clamp(min=1.0) / max(positions, 1.0)
    return per_token[rollouts] * chosen


@dataclass(frozen=True)
class HybridLoss:
    """total: what is differentiated. ntp, policy, supervised: its parts, without lambda."""

    total: Tensor
    ntp: Tensor
    policy: Tensor
    supervised: Tensor


def hybrid_loss(
    trunk_log_probs: Tensor,
    response_log_probs: Tensor,
    weights: LossWeights,
    *,
    ntp_coefficient: float,
) -> HybridLoss:
    """This micro-batch's share of the loss of the global batch.

    trunk_log_probs ``[trunk predictions]``, response_log_probs ``[response predictions]``: fp32,
    the latter under the sampling temperature. The policy part is GRPO on-policy: the ratio
    exp(logp - stopgrad(logp)) is 1, so clipping never acts, and there is no KL term (paper).
    """
    ratio = torch.exp(response_log_probs - response_log_probs.detach())
    policy = -(weights.policy * ratio).sum()
    ntp = -(weights.ntp * trunk_log_probs).sum()
    supervised = -(weights.supervised * response_log_probs).sum()
    return HybridLoss(policy + supervised + ntp_coefficient * ntp, ntp, policy, supervised)


def loss_coefficients(weights: LossWeights, *, ntp_coefficient: float) -> tuple[Tensor, Tensor]:
    """Derivative of ``hybrid_loss(...).total`` by each log-prob: of the trunk, of the responses.

    Known before the update because the ratio is 1, so that the head's gradients can be made in the
    pass that computes the log-probs (``head.weighted_log_prob_sum``).
    """
    return -ntp_coefficient * weights.ntp, -(weights.policy + weights.supervised)
