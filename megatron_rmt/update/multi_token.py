"""Multi-token prediction in the update: on the trunk alone, by Megatron's own layers.

Layer k (``--mtp-num-layers``) predicts from a token's hidden state, and from the k tokens that
follow it, the one after these (DeepSeek-V3, arXiv 2412.19437). Rollouts ignore these layers, and so
do stems and branches: what is trained is the next tokens of the user's samples, as Megatron trains
them, chosen positions included. Megatron shifts tokens and loss mask inside a sample, across the
documents in it; so does this. What crosses into or out of a prompt's preamble does not count.

The loss of a layer is the mean over what it predicts in the global batch, where Megatron takes the
mean of the micro-batches' means; the sum over layers has the weight ``--mtp-loss-scaling-factor``
/ layers beside the hybrid loss, whatever ``--rmt-ntp-coefficient`` is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.model.gpt import all_rows
from megatron_rmt.model.head import token_loss_sum
from megatron_rmt.model.pipeline import full_hidden
from megatron_rmt.model.visibility import TreeVisibility
from megatron_rmt.rollout.trunk import Sample, first_rows, trunk_blocks
from megatron_rmt.update.tree import NO_SAMPLE, ReasonedSample


@dataclass(frozen=True)
class LayerPredictions:
    """What one layer predicts: from ``rows`` of the trunk the ``targets``, both int64, with a
    ``loss_mask``, fp32; all ``[predictions]``."""

    rows: Tensor
    targets: Tensor
    loss_mask: Tensor


@dataclass
class MultiTokenPredictions:
    """What the layers of multi-token prediction read and predict of one micro-batch.

    tokens: ``[padded rows]`` int64, the trunk's. visibility: what its rows see. layers: in order.
    losses: ``[layers]``, once there are any: each layer's sum of masked losses in nats.
    """

    tokens: Tensor
    visibility: TreeVisibility
    layers: Sequence[LayerPredictions]
    losses: Tensor | None = field(default=None, repr=False)

    @property
    def counts(self) -> list[float]:
        """The sum of each layer's loss mask."""
        return [float(layer.loss_mask.sum()) for layer in self.layers]


def multi_token_predictions(
    reasoned: Sequence[ReasonedSample],
    layers: int,
    *,
    row_multiple: int,
    longest_position: int,
    device: torch.device,
    attention: str = "auto",
) -> MultiTokenPredictions:
    """Of the trunk of samples; one row that predicts nothing where there are none.

    row_multiple: what the number of rows must be a multiple of. longest_position, attention: as
    for ``grow_tree``.
    """
    trunk = [of.sample for of in reasoned] or [NO_SAMPLE]
    rows = sum(map(len, trunk))
    padding = -rows % row_multiple
    visibility = TreeVisibility(tokens=rows, blocks=tuple(trunk_blocks(trunk)), attention=attention)
    position_ids = torch.cat([sample.position_ids for sample in trunk])
    visibility.use_position_ids(F.pad(position_ids, (0, padding)).to(device), longest_position)
    # Where Megatron's shift ends.
    visibility.cu_seqlens_q = [*first_rows(trunk), rows]
    tokens = F.pad(torch.cat([sample.tokens for sample in trunk]), (0, padding))
    shifted = [_shifted(sample, layers) for sample in trunk]
    predictions = []
    for of_layer in zip(*shifted, strict=True):
        labels, mask = (torch.cat(own) for own in zip(*of_layer, strict=True))
        counted = mask.nonzero()[:, 0]
        own = counted, labels[counted], mask[counted]
        predictions.append(LayerPredictions(*(values.to(device) for values in own)))
    return MultiTokenPredictions(tokens.to(device), visibility, predictions)


def _shifted(sample: Sample, layers: int) -> list[tuple[Tensor, Tensor]]:
    """For each layer what the rows of ``sample`` predict, and the weight of it, 0 where nothing."""
    is_text = sample.columns >= 0
    labels, mask = sample.labels, sample.loss_mask * sample.labelled
    found = []
    for _ in range(layers):
        labels, mask = (F.pad(values[1:], (0, 1)) for values in (labels, mask))
        mask = mask * is_text
        found.append((labels, mask))
    return found


def multi_token_loss(
    model: GPTModel,
    hidden: Tensor,
    predictions: MultiTokenPredictions,
    counts: Sequence[float],
    *,
    weight: Tensor,
    rotary_pos_emb: Tensor | None,
    vocab_size: int,
    chunk_size: int,
    into_main_grad: bool,
) -> Tensor:
    """0-d, differentiable: the layers' share of the global batch's loss; ``predictions.losses`` is
    filled.

    hidden: the decoder's output ``[rows (/tp), 1, hidden]``, whose first rows are the trunk's.
    counts: of each layer, the sum of the loss mask over the global batch. weight: of the head.
    rotary_pos_emb: the table of ``GPTModel``. Other arguments as for ``token_loss_sum``.
    """
    config, padded = model.config, len(predictions.tokens)
    own = all_rows(hidden, config)[: predictions.visibility.tokens]
    own = F.pad(own, (0, 0, 0, 0, 0, padded - len(own)))
    if config.sequence_parallel:
        own = tensor_parallel.scatter_to_sequence_parallel_region(own)
    found = model.mtp(
        input_ids=predictions.tokens[None],
        position_ids=predictions.visibility.position_ids[None],
        hidden_states=own,
        attention_mask=None,
        rotary_pos_emb=rotary_pos_emb,
        packed_seq_params=predictions.visibility,
        embedding=model.embedding,
    )
    detached = config.mtp_detach_heads
    total, losses = own.new_zeros((), dtype=torch.float32), []
    of_layers = found.chunk(1 + len(predictions.layers))[1:]
    for of_layer, layer, count in zip(of_layers, predictions.layers, counts, strict=True):
        summed, _ = token_loss_sum(
            full_hidden(of_layer, config).index_select(0, layer.rows),
            weight.detach() if detached else weight,
            layer.targets,
            _masked(layer.loss_mask),
            vocab_size=vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            chunk_size=chunk_size,
            into_main_grad=into_main_grad and not detached,
        )
        losses.append(summed.detach())
        total = total + summed * (config.mtp_loss_scaling_factor / len(counts) / max(count, 1.0))
    predictions.losses = torch.stack(losses)
    return total


def _masked(loss_mask: Tensor) -> Any:
    return lambda rows, log_probs: -log_probs * loss_mask[rows]
