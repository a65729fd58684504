"""Forest packing: sizes, dealing out, the journey between ranks, which changes no sample."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rmt.update.packing import (
    TreeCost,
    TreeSize,
    deal_out,
    repack,
    tree_cost,
    tree_size,
)
from megatron_rmt.update.tree import ReasonedSample, Tree, grow_tree
from tests.distributed import run_distributed
from tests.packed import Responses, build_trunk, reasoned
from tests.tiny_model import LATENT, build_model

GROUP = 3
STEM = [7, 8]
LENGTH = 12
END = 0


def _samples(
    seed: int, samples: int = 3, positions: tuple[int, ...] = (2, 0, 1)
) -> list[ReasonedSample]:
    """Samples with several documents each, ``positions`` of them chosen, one response empty."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 50, (samples, LENGTH + 1), generator=generator)
    text[0, 4] = text[-1, 7] = END
    trunk = build_trunk(
        text[:, :-1],
        torch.arange(LENGTH).repeat(samples, 1) + seed,
        text[:, 1:],
        torch.rand(samples, LENGTH, generator=generator),
        preamble=[11, 12],
        end_of_document=END,
        separate_documents=True,
    )
    rows = []
    for sample, count in enumerate(positions):
        own = ((trunk.samples == sample) & (trunk.columns >= 0)).nonzero()[:, 0]
        rows += sorted(own[torch.randperm(len(own), generator=generator)[:count]].tolist())
    shape = (len(rows), GROUP, 6)
    lengths = torch.randint(1, 7, shape[:2], generator=generator)
    if rows:
        lengths[0, 1] = 0
    real = torch.arange(6) < lengths[..., None]
    responses = Responses(
        tokens=torch.randint(50, shape, generator=generator) * real,
        lengths=lengths,
        drawn=(torch.rand(shape, generator=generator) < 0.7) & real,
        log_probs=torch.randn(shape, generator=generator) * real,
    )
    found = reasoned(trunk, rows, responses, STEM)
    for position in (position for of in found for position in of.positions):
        position.advantages = torch.randn(GROUP, generator=generator).tolist()
    return found


def _grow(samples: list[ReasonedSample]) -> Tree:
    return grow_tree(samples, longest_position=100, device=torch.device("cpu"))


def _assert_equal(found: list[ReasonedSample], expected: list[ReasonedSample]) -> None:
    for own, other in zip(found, expected, strict=True):
        for field in dataclasses.fields(own.sample):
            _assert_same(getattr(own.sample, field.name), getattr(other.sample, field.name))
        for position, reference in zip(own.positions, other.positions, strict=True):
            assert position.row == reference.row
            assert position.advantages == reference.advantages
            for rollout, same in zip(position.rollouts, reference.rollouts, strict=True):
                for field in dataclasses.fields(rollout):
                    _assert_same(getattr(rollout, field.name), getattr(same, field.name))


def _assert_same(value: Any, reference: Any) -> None:
    if isinstance(value, Tensor):
        assert value.dtype == reference.dtype
        assert torch.equal(value, reference)
    elif isinstance(value, np.ndarray):
        assert value.dtype == reference.dtype
        assert np.array_equal(value, reference)
    else:
        assert value == reference


def test_an_empty_micro_batch_predicts_nothing():
    tree = _grow([])
    assert tree.tokens.shape == (1,)
    assert len(tree.targets) == len(tree.predicting) == tree.trunk_predictions == 0


def _ancestors(of: ReasonedSample) -> int:
    """(query, key) pairs, by walking up from every token of the tree."""
    pairs = 0
    for first, limit in of.sample.documents:
        pairs += sum(row - first + 1 for row in range(first, limit))
    for position in of.positions:
        first, _ = of.sample.document_of(position.row)
        prefix = position.row - first + 1
        pairs += sum(prefix + depth + 1 for depth in range(len(STEM)))
        for rollout in position.rollouts:
            pairs += sum(prefix + len(STEM) + depth + 1 for depth in range(len(rollout) - 1))
    return pairs


def test_sizes_are_those_of_the_grown_tree():
    for of in _samples(3):
        tree, size = _grow([of]), tree_size(of)
        assert size.tokens == tree.visibility.tokens
        assert size.predictions == len(tree.targets)
        assert size.pairs == _ancestors(of)


# Widths of all heads' queries and values together.
ATTENTION = {
    "key groups": ({}, 32 + 32),
    "latents": (LATENT, 4 * (10 + 7)),
    "latents, plain queries": (LATENT | {"q_lora_rank": None, "qk_layernorm": False}, 4 * (10 + 7)),
}


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize(("changes", "widths"), ATTENTION.values(), ids=ATTENTION)
def test_the_cost_counts_the_matrices_of_the_model(changes: dict[str, Any], widths: int):
    model = build_model(**changes)
    matrices = sum(
        parameter.numel() for name, parameter in model.named_parameters() if "linear" in name
    )
    cost = tree_cost(model.config, 53)
    # Two operations per weight and token; queries times keys and weights times values per pair.
    assert cost == TreeCost(2 * matrices, 2 * widths * 2, 2 * 32 * 53)
    assert cost.of(TreeSize(3, 5, 7)) == 3 * cost.token + 5 * cost.pair + 7 * cost.prediction


@pytest.mark.usefixtures("single_process_megatron")
def test_layers_of_a_hybrid_stack_cost_what_their_kind_does():
    model = build_model(pattern="M*M--M")
    matrices = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "decoder" in name
    )
    # Of each Mamba layer, four heads of 8 by 6 numbers.
    cost = tree_cost(model.config, 53, "M*M--M")
    assert cost == TreeCost(2 * matrices + 3 * 4 * 4 * 8 * 6, 2 * 2 * 32, 2 * 32 * 53)


@pytest.mark.usefixtures("single_process_megatron")
def test_only_the_experts_that_a_token_meets_cost():
    config = build_model().config
    dense = tree_cost(config, 53)
    experts = SimpleNamespace(
        **{
            **vars(config),
            "num_moe_experts": 8,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": config.ffn_hidden_size,
            "moe_shared_expert_intermediate_size": None,
        }
    )
    one_more = 2 * 3 * config.hidden_size * config.ffn_hidden_size * config.num_layers
    assert tree_cost(experts, 53).token == dense.token + one_more


def _deal(tokens: list[int], ranks: int, micro_batches: int, limit: int, use_all: bool = False):
    sizes = [TreeSize(count, 0, 0) for count in tokens]
    return deal_out(
        sizes, tokens, ranks=ranks, micro_batches=micro_batches, max_tokens=limit, use_all=use_all
    )


def _loads(dealt: list[list[list[int]]], tokens: list[int]) -> list[list[int]]:
    return [[sum(tokens[sample] for sample in part) for part in rank] for rank in dealt]


@pytest.mark.parametrize("use_all", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_every_sample_is_dealt_out_once_and_work_is_even(seed, use_all):
    generator = torch.Generator().manual_seed(seed)
    ranks, micro_batches = 4, 6
    tokens = torch.randint(50, 400, (24,), generator=generator).tolist()
    parts = _deal(tokens, ranks, micro_batches, 700, use_all)
    assert [len(rank) for rank in parts] == [micro_batches] * ranks
    everything = itertools.chain.from_iterable(itertools.chain.from_iterable(parts))
    assert sorted(everything) == list(range(24))
    loads = _loads(parts, tokens)
    of_ranks = [sum(rank) for rank in loads]
    # Longest first is within 4/3 of the best, which is at least the mean.
    assert max(of_ranks) <= sum(tokens) / ranks * 4 / 3
    in_order = [sum(tokens[r::ranks]) for r in range(ranks)]
    assert max(of_ranks) <= max(in_order)
    assert max(map(max, loads)) <= 700
    for rank in loads:
        assert rank == sorted(rank, reverse=True)
        used = sum(load > 0 for load in rank)
        assert used == 6 if use_all else used < 6


def test_as_few_micro_batches_as_hold_the_tokens():
    tokens = [300, 300, 300, 300, 100, 100]
    assert _loads(_deal(tokens, 1, 6, 1400), tokens) == [[1400, 0, 0, 0, 0, 0]]
    assert _loads(_deal(tokens, 1, 6, 700), tokens) == [[700, 700, 0, 0, 0, 0]]
    # 3 would do for the tokens, but no three hold these samples.
    assert _loads(_deal(tokens, 1, 6, 500), tokens) == [[400, 400, 300, 300, 0, 0]]


def test_what_does_not_fit_is_spread_over_all_micro_batches():
    tokens = [300, 300, 300, 900]
    assert _loads(_deal(tokens, 1, 2, 400), tokens) == [[900, 900]]
    assert _loads(_deal(tokens, 1, 3, 400), tokens) == [[900, 600, 300]]


def test_equal_costs_are_dealt_out_in_order():
    assert _deal([5] * 4, 2, 2, 5) == [[[0], [2]], [[1], [3]]]


def _of_rank(rank: int, index: int) -> list[ReasonedSample]:
    counts = ((2, 0, 1), (0, 0, 0), (9, 9, 9))[(rank + index) % 3]
    return _samples(10 * rank + index, positions=counts)


def _repacked(micro_batches: int, limit: int, use_all: bool) -> list[list[ReasonedSample]]:
    rank = torch.distributed.get_rank()
    return repack(
        [_of_rank(rank, index) for index in range(micro_batches)],
        TreeCost(1000, 1, 500),
        max_tokens=limit,
        use_all=use_all,
        dp_group=torch.distributed.group.WORLD,
        device=torch.device("cpu"),
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize(("ranks", "limit", "use_all"), [(2, 10_000, False), (3, 200, True)])
def test_samples_arrive_unchanged_on_the_rank_that_they_were_dealt_to(ranks, limit, use_all):
    micro_batches = 2
    results = run_distributed(ranks, _repacked, micro_batches, limit, use_all)
    samples = [
        sample
        for rank in range(ranks)
        for index in range(micro_batches)
        for sample in _of_rank(rank, index)
    ]
    sizes = [tree_size(sample) for sample in samples]
    cost = TreeCost(1000, 1, 500)
    dealt = deal_out(
        sizes,
        [cost.of(size) for size in sizes],
        ranks=ranks,
        micro_batches=micro_batches,
        max_tokens=limit,
        use_all=use_all,
    )
    per_rank = len(samples) // ranks
    moved = 0
    for rank, (parts, found) in enumerate(zip(dealt, results, strict=True)):
        assert len(found) == micro_batches
        for part, own in zip(parts, found, strict=True):
            moved += sum(sample // per_rank != rank for sample in part)
            _assert_equal(own, [samples[sample] for sample in part])
    assert moved > 0
    assert any(not part for rank in dealt for part in rank) != use_all


def _visible(tree: Tree) -> dict[str, Tensor]:
    return {
        "tokens": tree.tokens,
        "positions": tree.visibility.position_ids,
        "targets": tree.targets,
    }


def test_a_joined_tree_holds_the_trees_of_its_samples():
    """Row by row: each sample's tokens at the same positions, the same targets, all of them."""
    parts = _samples(4, positions=(2, 3, 1))
    whole = _grow(parts)
    trees = [_grow([part]) for part in parts]
    for name, value in _visible(whole).items():
        own = torch.cat([_visible(tree)[name] for tree in trees])
        assert torch.equal(value.sort().values, own.sort().values), name
    torch.testing.assert_close(whole.ntp_mask, torch.cat([tree.ntp_mask for tree in trees]))
    assert torch.equal(whole.drawn, torch.cat([tree.drawn for tree in trees]))
