"""The hybrid loss: ``L_GRPO(chosen tokens) + lambda * L_NTP(all others)`` (RMT, arXiv 2509.24375).

Both parts are weighted sums of log-probs whose weights are known before the update and already
hold the global means, so that the loss does not depend on how samples are split over micro-batches
and data-parallel ranks.

Normalisation is not given by the paper; ours: L_GRPO is GRPO's own (mean over a response's drawn
tokens, mean over the group), mean over the chosen positions of the global batch; L_NTP is the mean
over the other unmasked tokens of the global batch.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor


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


class Predictions(NamedTuple):
    """What a loss knows of each prediction besides its log-prob: fp32 ``[predictions]`` each, those
    of the trunk first, 0 where it does not apply.

    ntp, policy, supervised: weights of the log-prob in the global batch's loss. ntp: loss mask /
    unmasked tokens of the global batch. policy: advantage / (drawn tokens of the response * group *
    positions of the global batch). supervised: the format warm-up's. drawn_log_probs: of a drawn
    token, when it was.
    """

    ntp: Tensor
    policy: Tensor
    supervised: Tensor
    drawn_log_probs: Tensor

    @classmethod
    def of(cls, ntp: Tensor, *of_responses: Tensor) -> Self:
        """ntp: ``[trunk predictions]``; the others, in order, ``[response predictions]``."""
        on_trunk, on_responses = torch.zeros_like(ntp), torch.zeros_like(of_responses[0])
        padded = (torch.cat([on_trunk, values]) for values in of_responses)
        return cls(torch.cat([ntp, on_responses]), *padded)

    def at(self, rows: slice | Tensor) -> Self:
        """Those of ``rows`` alone, a slice or ``[predictions]`` bool."""
        return Predictions(*(values[rows] for values in self))


class TokenLosses(NamedTuple):
    """``[predictions]`` each: shares of the three parts of the global batch's loss, by prediction.

    The sum of each part is logged ("lm loss", "rmt rl loss", "rmt warm-up loss").
    """

    ntp: Tensor
    policy: Tensor
    supervised: Tensor

    def hybrid(self, ntp_coefficient: float) -> Tensor:
        """What is trained, ``[predictions]``."""
        return self.policy + self.supervised + ntp_coefficient * self.ntp


TokenLoss = Callable[[Tensor, Predictions], TokenLosses]


def token_losses(log_probs: Tensor, predictions: Predictions) -> TokenLosses:
    """The loss: ``TokenLosses`` of ``log_probs`` ``[predictions]``, differentiable in them.

    Any function of this signature can take its place (``LOSSES``), also one that is not linear. It
    is called for some predictions at a time, so that each share depends on its own
    prediction alone. log_probs: fp32 (fp64 for fp64 models), those of responses under the sampling
    temperature.

    The policy part is GRPO on-policy: the ratio exp(logp - stopgrad(logp)) is 1, so clipping never
    acts, and there is no KL term (paper).
    """
    ratio = torch.exp(log_probs - log_probs.detach())
    return TokenLosses(
        ntp=-predictions.ntp * log_probs,
        policy=-predictions.policy * ratio,
        supervised=-predictions.supervised * log_probs,
    )


# By name of --rmt-loss.
LOSSES: dict[str, TokenLoss] = {"hybrid": token_losses}
