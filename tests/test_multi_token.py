"""Multi-token prediction: Megatron's own losses of the trunk, and nothing else changes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    MTPLossLoggingHelper,
)
from torch import Tensor

from megatron_rmt.model.gpt import Policy
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.rollout.kv_cache import KeyValueStore
from megatron_rmt.rollout.memory import key_value_bytes
from megatron_rmt.rollout.prefill import read_trunk
from megatron_rmt.rollout.trunk import UserBatch, build_trunk
from megatron_rmt.update.multi_token import MultiTokenPredictions, multi_token_predictions
from megatron_rmt.update.tree import ReasonedSample
from tests import test_forward_step as step
from tests import tiny_model
from tests.packed import reasoned
from tests.tiny_model import LONGEST_POSITION, VOCAB, build_model

pytestmark = pytest.mark.usefixtures("single_process_megatron")

FACTOR = 0.3
SEEDS = (1, 2)


def _predictions(batch: step.MicroBatch, layers: int, **how: Any) -> MultiTokenPredictions:
    samples = reasoned(batch.trunk, batch.rows, batch.responses, step.STEM)
    options = {"row_multiple": 1, "longest_position": LONGEST_POSITION, **how}
    return multi_token_predictions(samples, layers, device=torch.device("cpu"), **options)


def _models(layers: int, **options: Any) -> tuple[GPTModel, GPTModel, GPTModel]:
    """The stock model with the layers of multi-token prediction and without, and with trees."""
    further = {"mtp_num_layers": layers, "mtp_loss_scaling_factor": FACTOR}
    stock, plain = build_model(**options, **further), build_model(**options)
    with_trees = build_model(**options, **further)
    with_trees.load_state_dict(stock.state_dict())
    plain.load_state_dict(stock.state_dict(), strict=False)
    attach_tree_attention(with_trees)
    return stock.train(), plain.train(), with_trees.train()


def _gradients_of_megatron(model: GPTModel, separate: bool) -> dict[str, Tensor]:
    """Of the further losses, of all samples in one plain batch."""
    samples = [
        step._documents(torch.Generator().manual_seed(seed), separate=separate) for seed in SEEDS
    ]
    tokens, positions, labels, loss_mask = map(torch.cat, zip(*samples, strict=True))
    place = torch.arange(step.LENGTH)
    hidden = (place > place[:, None]).repeat(len(tokens), 1, 1)
    if separate:
        ends = (tokens == step.END_OF_DOCUMENT).long()
        document = ends.cumsum(1) - ends
        hidden |= document[:, None] != document[:, :, None]
    # Megatron's own is in fp32, whatever the model's dtype.
    model.compute_language_model_loss = lambda labels, logits: F.cross_entropy(
        logits.permute(1, 2, 0), labels, reduction="none"
    )
    MTPLossLoggingHelper.tracker.clear()
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    model.zero_grad()
    losses = model(tokens, positions, hidden[:, None], labels=labels, loss_mask=loss_mask.double())
    (0 * losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ARCHITECTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "one layer": (1, {}),
    "two layers, tied": (2, {"tied": True}),
    "one layer twice": (2, {"mtp_use_repeated_layer": True}),
    "absolute positions": (1, step.ARCHITECTURES["gpt2"]),
    "windows": (1, step.ARCHITECTURES["windows"]),
    "full recompute": (2, step.FULL_RECOMPUTE),
    "MuP": (1, step.ARCHITECTURES["MuP"]),
    "heads apart": (1, {"mtp_detach_heads": True}),
}


@pytest.mark.parametrize(
    ("architecture", "separate"),
    [
        *((name, False) for name in ARCHITECTURES),
        # Under masks of documents Megatron's windows reach into the document before.
        *((name, True) for name in ("absolute positions", "one layer", "heads apart")),
    ],
)
def test_gradients_are_those_of_the_rollouts_and_of_megatrons_further_losses(
    monkeypatch, architecture: str, separate: bool
):
    layers, options = ARCHITECTURES[architecture]
    # Megatron's own loss takes padding for tokens.
    monkeypatch.setattr(tiny_model, "PADDED_VOCAB", VOCAB)
    stock, plain, with_trees = _models(layers, **options)
    batches = [step._micro_batch(seed, separate, [], step.STEM) for seed in SEEDS]
    further = [_predictions(batch, layers, row_multiple=4) for batch in batches]
    counts = [sum(own) for own in zip(*(own.counts for own in further), strict=True)]
    assert counts[0] > 20
    updates, settings = step._updates, step._loss_settings

    def with_further(*args: Any) -> list[step.Update]:
        found = updates(*args)
        for update, own in zip(found, further, strict=True):
            update.further = own
        return found

    monkeypatch.setattr(step, "_updates", with_further)
    monkeypatch.setattr(
        step,
        "_loss_settings",
        lambda found: step.dataclasses.replace(settings(found), further_tokens=counts),
    )
    _, found, reports, _ = step._tree_step(with_trees, batches, torch.float64)
    expected = step._naive_step(plain, batches, step.STEM)[1]
    for name, value in _gradients_of_megatron(stock, separate).items():
        # ``_tree_step`` trains on the sum of the micro-batches' losses.
        expected[name] = expected.get(name, 0) + value
    assert found.keys() == expected.keys()
    # Megatron rotates documents by their places in the sample, to the rounding of fp32 angles.
    tolerance = 1e-6 if separate and options is not step.ARCHITECTURES["gpt2"] else 1e-12
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert float((found[name] - value).norm() / value.norm()) < tolerance, name
    for layer in range(layers):
        losses = torch.stack([report[f"mtp_{layer + 1} loss"] for report in reports])
        assert losses[:, 1].sum() == counts[layer]
        assert 2 < losses[:, 0].sum() / losses[:, 1].sum() < 12


def _trunk(head: list[int]) -> list[ReasonedSample]:
    tokens = torch.arange(1, 9).view(2, 4)
    tokens[0, 1] = step.END_OF_DOCUMENT
    labels, mask = torch.arange(21, 29).view(2, 4), torch.ones(2, 4)
    mask[1, 2] = 0.5
    batch = UserBatch(tokens, torch.arange(4).repeat(2, 1), labels, mask)
    samples = build_trunk(
        batch,
        range(2),
        preamble=head,
        end_of_document=step.END_OF_DOCUMENT,
        separate_documents=True,
    )
    return [ReasonedSample(sample) for sample in samples]


def test_tokens_are_shifted_inside_samples_and_not_into_a_preamble():
    how = {"row_multiple": 8, "longest_position": LONGEST_POSITION, "device": torch.device("cpu")}
    first, second = multi_token_predictions(_trunk([]), 2, **how).layers
    # Across the end of a document, as Megatron does.
    assert first.rows.tolist() == [0, 1, 2, 4, 5, 6]
    assert first.targets.tolist() == [22, 23, 24, 26, 27, 28]
    assert first.loss_mask.tolist() == [1, 1, 1, 1, 0.5, 1]
    assert second.rows.tolist() == [0, 1, 4, 5]
    assert second.targets.tolist() == [23, 24, 27, 28]
    # Each document has two rows of a preamble before it: 0, 1, then 4, 5, then 8, 9.
    found = multi_token_predictions(_trunk([11, 12]), 2, **how)
    first, second = found.layers
    assert first.rows.tolist() == [2, 6, 10, 11, 12]
    assert first.targets.tolist() == [22, 24, 26, 27, 28]
    assert second.rows.tolist() == [10, 11]
    assert found.visibility.tokens == 14
    assert len(found.tokens) == 16
    assert found.visibility.cu_seqlens_q == [0, 8, 14]


def test_a_micro_batch_without_samples_predicts_nothing():
    found = multi_token_predictions(
        [], 1, row_multiple=1, longest_position=LONGEST_POSITION, device=torch.device("cpu")
    )
    assert found.counts == [0.0]
    assert len(found.tokens) == 1


def test_the_trunk_pass_leaves_the_further_layers_out():
    _, plain, with_trees = _models(2)
    attach_tree_attention(plain)
    assert key_value_bytes(with_trees) == key_value_bytes(plain)
    found = []
    for model in (plain, with_trees):
        model.eval()
        if model is with_trees:
            model.mtp.forward = None
        trunk = [of.sample for of in _trunk([11])]
        store = KeyValueStore(sum(map(len, trunk)))
        policy = Policy(model, VOCAB, LONGEST_POSITION, head_chunk_size=7)
        found.append((*read_trunk(policy, trunk, store, 0)[:2], store.trunk))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2].keys() == found[1][2].keys()
