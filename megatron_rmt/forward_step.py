"""The forward step that Megatron's schedules run for each micro-batch of the update."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_rmt.head import token_statistics
from megatron_rmt.losses import LossWeights, hybrid_loss
from megatron_rmt.rollout import full_hidden
from megatron_rmt.tree import Tree

# [sum, count]: Megatron adds both over micro-batches and data-parallel ranks and divides.
Metric = tuple[float, float]


@dataclass
class Update:
    """One micro-batch of the update: its tree, the weights of its predictions, what to report.

    metrics: [sum, count] of what is known before the update; every micro-batch of every rank has
    the same keys. largest_difference: 0-d, filled by the loss: max |log-prob now - when drawn|.
    """

    tree: Tree
    weights: LossWeights
    metrics: dict[str, Metric]
    largest_difference: Tensor = field(default_factory=lambda: torch.zeros(()))


@dataclass(frozen=True)
class LossSettings:
    """ntp_coefficient: the paper's lambda. temperature: at which responses were drawn.
    vocab_size: without padding. chunk_size: rows of the head at a time. ntp_tokens: unmasked NTP
    tokens of the global batch. scale: undoes what Megatron divides the loss by."""

    ntp_coefficient: float
    temperature: float
    vocab_size: int
    chunk_size: int
    ntp_tokens: float
    scale: float


def make_forward_step(settings: LossSettings) -> Callable[..., Any]:
    """A Megatron ``forward_step_func`` over an iterator of ``Update``."""

    def forward_step(updates: Iterator[Update], model: torch.nn.Module) -> tuple[Tensor, Any]:
        update = next(updates)
        output = model(
            input_ids=update.tree.tokens[None],
            position_ids=update.tree.plan.positions[None],
            attention_mask=None,
            packed_seq_params=update.tree.plan,
            output_processor=_log_probs_of_predictions,
            output_processor_context=(update.tree, settings),
        )
        return output, functools.partial(_loss, update, settings)

    return forward_step


def _log_probs_of_predictions(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    context: tuple[Tree, LossSettings],
    config: Any,
    **_: Any,
) -> Tensor:
    """``GPTModel``'s ``output_processor``: log-probs ``[predictions]`` of the tree's targets.

    Only rows that predict something reach the head. Scores are linear in the hidden state, so the
    sampling temperature divides the hidden rows of responses.
    """
    tree, settings = context
    hidden = full_hidden(hidden_states, config).index_select(0, tree.predicting)
    precision = torch.promote_types(hidden.dtype, torch.float32)
    temperature = torch.ones(hidden.shape[0], 1, device=hidden.device, dtype=precision)
    temperature[tree.trunk_predictions :] = settings.temperature
    log_probs, _ = token_statistics(
        (hidden / temperature).to(hidden.dtype),
        output_layer.weight if output_weight is None else output_weight,
        tree.targets,
        vocab_size=settings.vocab_size,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        chunk_size=settings.chunk_size,
    )
    return log_probs


def _loss(
    update: Update, settings: LossSettings, log_probs: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's ``loss_func``: (loss, 1 "token", report).

    Megatron divides by the number of micro-batches and data-parallel ranks, or with
    ``--calculate-per-token-loss`` by the reported tokens of all of them: by the same number, as
    each micro-batch reports one. ``settings.scale`` undoes it, since the weights are global.
    """
    tree = update.tree
    on_trunk, on_responses = log_probs.split(
        [tree.trunk_predictions, log_probs.shape[0] - tree.trunk_predictions]
    )
    loss = hybrid_loss(
        on_trunk, on_responses, update.weights, ntp_coefficient=settings.ntp_coefficient
    )
    # Forced tokens were not drawn, so there is nothing to compare.
    difference = (on_responses.detach() - tree.sampled_log_probs).abs() * tree.sampled
    if difference.numel():
        update.largest_difference = difference.max()
    report = {key: torch.tensor(value) for key, value in update.metrics.items()}
    ntp_tokens = tree.ntp_mask.sum()
    report["lm loss"] = torch.stack([loss.ntp.detach() * settings.ntp_tokens, ntp_tokens])
    one = torch.ones((), device=log_probs.device) / settings.scale
    report["rmt rl loss"] = torch.stack([loss.policy.detach(), one])
    report["rmt warm-up loss"] = torch.stack([loss.supervised.detach(), one])
    report["rmt logprob difference"] = torch.stack([difference.sum(), tree.sampled.float().sum()])
    report = {key: value.to(log_probs.device).float() for key, value in report.items()}
    one_token = torch.ones((), dtype=torch.int, device=log_probs.device)
    return loss.total * settings.scale, one_token, report
