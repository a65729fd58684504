"""The forward step that Megatron's schedules run for each micro-batch of the update.

Mixture of experts: what Megatron adds to the loss for the routers (load balance, z-loss) is taken
over the tokens of a micro-batch's tree, and averaged over the micro-batches, with and without
``--calculate-per-token-loss`` (``counting_trees``). The trunk counts once there, not once for each
rollout that shares it, and padding not at all; so these terms, and the expert bias, differ from a
run with one sequence per rollout, and, as always in Megatron, with the split into micro-batches;
``seq_aux_loss`` takes the whole tree, of all samples of the micro-batch, for one sequence. All else
is equal.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model, get_model_config
from torch import Tensor

from megatron_rmt.algorithm.losses import Predictions, TokenLoss, token_losses
from megatron_rmt.algorithm.rewards import Metric
from megatron_rmt.model.head import token_loss_sum
from megatron_rmt.model.pipeline import full_hidden
from megatron_rmt.model.routers import padding_mask
from megatron_rmt.update.multi_token import MultiTokenPredictions, multi_token_loss
from megatron_rmt.update.tree import ReasonedSample, Tree


@dataclass
class Update:
    """One micro-batch of the update: its tree, what the loss knows of its predictions, metrics.

    metrics: [sum, count] of what is known before the update; every micro-batch of every rank has
    the same keys. largest_difference, difference: 0-d and ``[sum, tokens]``, filled by the loss:
    |log-prob now - when drawn|, zeros on stages without a loss. output: ``[1 + predictions]`` fp32,
    the loss and the targets' log-probs, once there are any. reasoned: the tree's samples. further:
    of the layers of multi-token prediction, None without them.
    """

    tree: Tree
    predictions: Predictions
    metrics: dict[str, Metric]
    largest_difference: Tensor = field(default_factory=lambda: torch.zeros(()))
    difference: Tensor = field(default_factory=lambda: torch.zeros(2))
    output: Tensor | None = None
    reasoned: Sequence[ReasonedSample] = ()
    further: MultiTokenPredictions | None = None


@dataclass(frozen=True)
class LossSettings:
    """ntp_coefficient: the paper's lambda. temperature: at which responses were drawn.
    vocab_size: without padding. chunk_size: rows of the head at a time. ntp_tokens: unmasked NTP
    tokens of the global batch. scale: undoes what Megatron divides the loss by. loss: what is
    trained and logged. further_tokens: the same as ntp_tokens, of each layer of multi-token
    prediction."""

    ntp_coefficient: float
    temperature: float
    vocab_size: int
    chunk_size: int
    ntp_tokens: float
    scale: float
    loss: TokenLoss = token_losses
    further_tokens: Sequence[float] = ()


def make_forward_step(settings: LossSettings) -> Callable[..., Any]:
    """A Megatron ``forward_step_func`` over an iterator of ``Update``."""
    # Megatron has one, which ``--log-straggler`` turns on; without a time it divides by zero.
    timed_for_stragglers = StragglerDetector()

    def forward_step(updates: Iterator[Update], model: torch.nn.Module) -> tuple[Tensor, Any]:
        update = next(updates)
        with timed_for_stragglers:
            output = model(
                input_ids=update.tree.tokens[None],
                position_ids=update.tree.visibility.position_ids[None],
                attention_mask=None,
                packed_seq_params=update.tree.visibility,
                padding_mask=_padding(update.tree, model),
                output_processor=_read_predictions,
                output_processor_context=(update, settings, model),
            )
        return output, functools.partial(_loss, update, settings)

    return forward_step


def _padding(tree: Tree, model: torch.nn.Module) -> Tensor | None:
    """What the routers leave out, where the tree lies."""
    embeds = get_attr_wrapped_model(model, "pre_process")
    config = get_model_config(model)
    mask = padding_mask(tree.tokens.shape[0], tree.visibility.tokens, config, embeds=embeds)
    return None if mask is None else mask.to(tree.tokens.device)


def _read_predictions(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    context: tuple[Update, LossSettings, torch.nn.Module],
    config: Any,
    rotary_pos_emb: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """``GPTModel``'s ``output_processor``: ``[1 + predictions]`` fp32.

    First the loss, then the log-probs of the tree's targets, constants. Only rows that predict
    something reach the head. The sampling temperature divides the scores of responses.
    """
    update, settings, model = context
    tree, predictions = update.tree, update.predictions
    hidden = full_hidden(hidden_states, config)
    hidden = _rows_of(hidden, tree.predicting, sorts=hidden.is_cuda)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    scale = torch.ones(hidden.shape[0], dtype=wide, device=hidden.device)
    scale[tree.trunk_predictions :] = 1 / settings.temperature

    def loss(rows: slice, log_probs: Tensor) -> Tensor:
        losses = settings.loss(log_probs, predictions.at(rows))
        return losses.hybrid(settings.ntp_coefficient)

    weight = output_layer.weight if output_weight is None else output_weight
    how = {
        "vocab_size": settings.vocab_size,
        "chunk_size": settings.chunk_size,
        # A tied weight gets a second gradient, of the embedding, which Megatron adds itself.
        "into_main_grad": output_weight is None
        and config.gradient_accumulation_fusion
        and hasattr(weight, "main_grad"),
    }
    total, log_probs = token_loss_sum(
        hidden,
        weight,
        tree.targets,
        loss,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        scale=scale,
        **how,
    )
    if update.further is not None:
        total = total + multi_token_loss(
            get_attr_wrapped_model(model, "mtp", return_model_obj=True),
            hidden_states,
            update.further,
            settings.further_tokens,
            weight=weight,
            rotary_pos_emb=rotary_pos_emb,
            **how,
        )
    return torch.cat([total[None], log_probs])


def _rows_of(hidden: Tensor, rows: Tensor, sorts: bool) -> Tensor:
    """``hidden[rows]``, some of them several times. sorts: backward adds in the order of ``rows``
    on a GPU too, where ``index_select`` adds by atomics, in any order."""
    return hidden[rows] if sorts else hidden.index_select(0, rows)


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` of the host in one copy, for which a GPU's host does not wait."""
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)


def _loss(
    update: Update, settings: LossSettings, output: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's ``loss_func``: (loss, 1 "token", report).

    Megatron divides by the number of micro-batches and data-parallel ranks, or with
    ``--calculate-per-token-loss`` by the reported tokens of all of them: by the same number, as
    each micro-batch reports one. ``settings.scale`` undoes it, since the weights are global.
    """
    tree = update.tree
    total, log_probs = output[0], output[1:].detach()
    update.output = output.detach()
    on_trunk, on_responses = slice(tree.trunk_predictions), slice(tree.trunk_predictions, None)

    def sums_of(rows: slice) -> Tensor:
        losses = settings.loss(log_probs[rows], update.predictions.at(rows))
        return torch.stack([part.sum() for part in losses])

    # What is trained, in its parts; apart, as a sum's last digit depends on what zeros are added.
    ntp, policy, supervised = sums_of(on_trunk) + sums_of(on_responses)
    # Forced tokens were not drawn, so there is nothing to compare.
    difference = (log_probs[on_responses] - tree.drawn_log_probs).abs() * tree.drawn
    if difference.numel():
        update.largest_difference = difference.max()
    known = torch.tensor([*update.metrics.values()], dtype=torch.float32).view(-1, 2)
    report = dict(zip(update.metrics, _to_device(known, log_probs.device), strict=True))
    report["lm loss"] = torch.stack([ntp * settings.ntp_tokens, tree.ntp_mask.sum()])
    one = torch.ones((), device=log_probs.device) / settings.scale
    report["rmt rl loss"] = torch.stack([policy, one])
    report["rmt warm-up loss"] = torch.stack([supervised, one])
    update.difference = torch.stack([difference.sum(), tree.drawn.float().sum()])
    report["rmt logprob difference"] = update.difference
    if update.further is not None:
        # Megatron's names of them.
        for number, (losses, count) in enumerate(
            zip(update.further.losses, update.further.counts, strict=True), start=1
        ):
            report[f"mtp_{number} loss"] = torch.stack([losses, losses.new_tensor(count)])
    report = {key: value.float() for key, value in report.items()}
    one_token = torch.ones((), dtype=torch.int, device=log_probs.device)
    return total * settings.scale, one_token, report
