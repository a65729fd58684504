"""The trunk pass against the stock model in float64: entropies, predictions, keys and values."""

import math

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rmt.model.gpt import Policy
from megatron_rmt.model.visibility import attach_tree_attention
from megatron_rmt.rollout.kv_cache import KeyValueStore
from megatron_rmt.rollout.prefill import EntropyHistogram, read_trunk
from megatron_rmt.rollout.trunk import Sample, UserBatch, build_trunk, first_rows
from tests.distributed import run_distributed
from tests.tiny_model import LONGEST_POSITION, VOCAB, build_model, stock_logits

pytestmark = pytest.mark.usefixtures("single_process_megatron")

END_OF_DOCUMENT = 0


def _trunk(seed: int, head: list[int]) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, VOCAB, (2, 13), generator=generator)
    text[0, 4] = text[1, 8] = END_OF_DOCUMENT
    positions = torch.arange(12).repeat(2, 1)
    for sample, end in ((0, 5), (1, 9)):
        positions[sample, end:] -= end
    return build_trunk(
        UserBatch(text[:, :-1], positions, text[:, 1:], torch.ones(2, 12)),
        [0, 1],
        preamble=head,
        end_of_document=END_OF_DOCUMENT,
        separate_documents=True,
    )


def _models(dtype: torch.dtype = torch.float64) -> tuple[GPTModel, GPTModel]:
    stock, with_trees = build_model(dtype), build_model(dtype)
    with_trees.load_state_dict(stock.state_dict())
    attach_tree_attention(with_trees)
    return stock.eval(), with_trees.eval()


def _read(model: GPTModel, trunks: list[list[Sample]], top_k: int | None = None) -> tuple:
    policy = Policy(model, VOCAB, LONGEST_POSITION, head_chunk_size=7)
    store = KeyValueStore(sum(len(sample) for trunk in trunks for sample in trunk))
    results, first_row = [], 0
    for trunk in trunks:
        results.append(read_trunk(policy, trunk, store, first_row, top_k=top_k))
        first_row += sum(map(len, trunk))
    return store, results


def _documents(trunk: list[Sample]) -> list[tuple[slice, Tensor]]:
    """The rows of the trunk and the tokens of each document."""
    return [
        (slice(start + first, start + limit), sample.tokens[first:limit])
        for sample, start in zip(trunk, first_rows(trunk), strict=True)
        for first, limit in sample.documents
    ]


@pytest.mark.parametrize("head", [[], [11, 12]], ids=["no head", "head"])
@pytest.mark.parametrize("top_k", [None, 5])
def test_entropies_and_predictions_of_every_row(head, top_k):
    stock, with_trees = _models()
    trunks = [_trunk(seed, head) for seed in (1, 2)]
    _, results = _read(with_trees, trunks, top_k)
    for trunk, (entropies, predictions, _) in zip(trunks, results, strict=True):
        assert entropies.dtype == torch.float32
        assert len(entropies) == len(predictions) == sum(map(len, trunk))
        for rows, tokens in _documents(trunk):
            with torch.no_grad():
                p = stock_logits(stock, tokens).softmax(-1)
            assert torch.equal(predictions[rows], p.argmax(-1))
            if top_k is not None:
                p = p.sort(descending=True).values[:, :top_k]
                p = p / p.sum(-1, keepdim=True)
            reference = -(p * p.log()).sum(-1)
            torch.testing.assert_close(entropies[rows].double(), reference, rtol=1e-6, atol=1e-7)


def test_the_store_holds_the_keys_and_values_of_the_stock_model():
    stock, with_trees = _models()
    trunks = [_trunk(seed, [11, 12]) for seed in (1, 2)]
    store, _ = _read(with_trees, trunks)
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {1: [], 2: []}
    for layer in stock.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(
            lambda _, args, layer=layer.layer_number: seen[layer].append(
                (args[1][:, 0], args[2][:, 0])
            )
        )
    for trunk in trunks:
        for _, tokens in _documents(trunk):
            with torch.no_grad():
                stock_logits(stock, tokens)
    for layer, pairs in seen.items():
        for stored, documents in zip(store.trunk[layer], zip(*pairs, strict=True), strict=True):
            reference = torch.cat(documents).transpose(0, 1)
            torch.testing.assert_close(stored, reference, rtol=1e-12, atol=1e-13)


def test_log_probs_are_of_the_labels_and_change_nothing_else():
    stock, with_trees = _models()
    trunk = _trunk(1, [11, 12])
    policy = Policy(with_trees, VOCAB, LONGEST_POSITION, head_chunk_size=7)
    rows = sum(map(len, trunk))
    plain = read_trunk(policy, trunk, KeyValueStore(rows), 0)
    asked = read_trunk(policy, trunk, KeyValueStore(rows), 0, with_log_probs=True)
    assert plain.log_probs is None
    assert torch.equal(asked.entropies, plain.entropies)
    assert torch.equal(asked.predictions, plain.predictions)
    labels = torch.cat([sample.labels for sample in trunk])
    for own, tokens in _documents(trunk):
        with torch.no_grad():
            reference = stock_logits(stock, tokens).log_softmax(-1)
        reference = reference.gather(1, labels[own, None].clamp(min=0))[:, 0]
        known = labels[own] >= 0
        assert 0 < known.sum() < len(known)
        found = asked.log_probs[own]
        assert found[~known].isnan().all()
        torch.testing.assert_close(found[known].double(), reference[known], rtol=1e-6, atol=1e-7)


def test_a_document_does_not_depend_on_its_neighbours():
    _, with_trees = _models()
    trunk, other = _trunk(1, []), _trunk(1, [])
    # The first document of the second sample: one sample before it, one document behind it.
    own, _ = _documents(trunk)[2]
    other[0].tokens[:] = 3
    other[1].tokens[other[1].documents[0][1] :] = 4
    entropies, changed = (_read(with_trees, [t])[1][0][0] for t in (trunk, other))
    assert torch.equal(entropies[own], changed[own])
    assert not torch.equal(entropies[: own.start], changed[: own.start])
    assert not torch.equal(entropies[own.stop :], changed[own.stop :])


def test_no_gradient_is_kept():
    _, with_trees = _models()
    store, results = _read(with_trees, [_trunk(1, [])])
    tensors = [tensor for pair in store.trunk.values() for tensor in pair] + [*results[0][:2]]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_percentiles_are_those_of_the_sorted_entropies_to_a_hundredth():
    entropies = torch.rand(1037, generator=torch.Generator().manual_seed(3)).square() * 11
    found = EntropyHistogram(entropies).percentiles()
    for percentile, value in found.items():
        exact = np.percentile(entropies.numpy(), percentile, method="inverted_cdf")
        assert value == pytest.approx(exact, abs=0.00501)
    assert list(found) == [10, 50, 90]
    nothing = EntropyHistogram(torch.empty(0))
    assert all(math.isnan(value) for value in nothing.percentiles().values())
    assert all(math.isnan(value) for value in nothing.quantiles((0.1, 0.5)))
    assert EntropyHistogram(torch.tensor([1e-8])).percentiles()[50] == pytest.approx(0.005)


@pytest.mark.parametrize("count", [1, 7, 100, 1037])
def test_a_quantile_is_the_lower_end_of_the_bin_of_the_sorted_entropies(count):
    entropies = torch.rand(count, generator=torch.Generator().manual_seed(count)).square() * 11
    percents = (0, 7, 30, 35, 70, 95)
    quantiles = EntropyHistogram(entropies).quantiles([percent / 100 for percent in percents])
    for percent, found in zip(percents, quantiles, strict=True):
        exact = entropies.sort().values[max(1, -(-count * percent // 100)) - 1]
        assert found <= exact < found + 0.0100001
    # All are at least as uncertain as the first quantile.
    assert (entropies >= EntropyHistogram(entropies).quantiles((0.0,))[0]).all()


def _of_a_share() -> tuple[dict[int, float], tuple[float, ...]]:
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    entropies = torch.linspace(0, 6, 101)
    found = EntropyHistogram(entropies[parallel_state.get_data_parallel_rank() :: 2])
    return found.percentiles(), found.quantiles((0.2, 0.5, 0.8))


@pytest.mark.multiprocess
def test_percentiles_and_quantiles_are_of_all_data_parallel_ranks():
    whole = EntropyHistogram(torch.linspace(0, 6, 101))
    expected = whole.percentiles(), whole.quantiles((0.2, 0.5, 0.8))
    assert run_distributed(2, _of_a_share) == [expected, expected]
