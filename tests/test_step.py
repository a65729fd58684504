"""The decisions of a step: sample numbers, positions, weights, sizes."""

import dataclasses
from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch import Tensor

from megatron_rmt import step as rmt_step
from megatron_rmt.algorithm.curriculum import Candidates
from megatron_rmt.algorithm.doors import DoorError
from megatron_rmt.algorithm.settings import Settings
from megatron_rmt.rollout.prefill import EntropyHistogram
from megatron_rmt.rollout.trunk import NO_LABEL, UserBatch, build_trunk
from megatron_rmt.step import choose, global_sample_indices, thresholds_of_step
from megatron_rmt.update.report import (
    answer_metrics,
    batch_metrics,
    size_metrics,
    source_metrics,
    trunk_metrics,
)
from megatron_rmt.update.tree import ReasonedSample, Tree, grow_tree, pad_tree
from megatron_rmt.update.warm_up import response_from_text
from megatron_rmt.update.weights import loss_weights
from tests.distributed import run_distributed
from tests.packed import Trunk, reasoned
from tests.tiny_step import (
    BYTES,
    Scored,
    readable_rows,
    score,
    scored,
    tiny_run,
    tiny_schedule,
    tiny_trunk,
)

THRESHOLDS = Settings().entropy_thresholds


def _indices_of_rank(size: int, micro_batches: int) -> list[list[int]]:
    """From sample 12 on; compared with Megatron's own sampler on this rank."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    args = Namespace(micro_batch_size=size, consumed_train_samples=12)
    indices = global_sample_indices(args, micro_batches)
    sampler = iter(
        MegatronPretrainingSampler(
            total_samples=100,
            consumed_samples=12,
            micro_batch_size=size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
        )
    )
    assert indices == [next(sampler) for _ in range(micro_batches)]
    return indices


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize(("size", "micro_batches"), [(1, 4), (2, 2), (4, 1)])
def test_samples_have_the_numbers_that_megatron_deals_out(size, micro_batches):
    indices = _indices_of_rank(size, micro_batches)
    assert [index for batch in indices for index in batch] == [12, 13, 14, 15]


@pytest.mark.multiprocess
@pytest.mark.parametrize(("size", "micro_batches"), [(1, 2), (2, 1)])
def test_two_data_parallel_ranks_share_the_same_numbers(size, micro_batches):
    ranks = run_distributed(2, _indices_of_rank, size, micro_batches)
    assert sorted(index for rank in ranks for batch in rank for index in batch) == [12, 13, 14, 15]


def _entropies(trunk: Trunk) -> Tensor:
    """By sample and column, so that they do not depend on the preamble."""
    generator = torch.Generator().manual_seed(1)
    return (2.2 * torch.rand(2, 200, generator=generator))[trunk.samples, trunk.columns]


def _chosen(
    trunk: Trunk,
    entropies: Tensor,
    indices: tuple[int, int] = (7, 8),
    thresholds: tuple[float, ...] = THRESHOLDS,
    ceiling: float | None = None,
    **schedule: Any,
) -> tuple[list[int], Tensor]:
    """The chosen rows of the trunk, and the tier of every row."""
    trunk.indices = list(indices)
    samples = reasoned(trunk, [], None)
    run = tiny_run() if ceiling is None else tiny_run(entropy_ceiling=ceiling)
    tier = choose(run, samples, entropies, thresholds, tiny_schedule(**schedule))
    starts = [0, len(samples[0].sample)]
    return [
        start + position.row
        for of, start in zip(samples, starts, strict=True)
        for position in of.positions
    ], tier


@pytest.mark.parametrize("probabilities", [(0.6, 0.3, 0.1), None], ids=["curriculum", "uniform"])
def test_chosen_rows_are_labelled_unmasked_readable_and_uncertain(probabilities):
    trunk = tiny_trunk()
    entropies = _entropies(trunk)
    eligible = [
        row
        for row in range(len(trunk))
        if trunk.columns[row] >= 0
        and trunk.labels[row] != NO_LABEL
        and trunk.loss_mask[row] > 0
        and BYTES[trunk.labels[row]]
        and entropies[row] >= 0.5
    ]
    seen = set()
    for iteration in range(60):
        schedule = {"iteration": iteration, "probabilities": probabilities}
        rows, tier = _chosen(trunk, entropies, positions_per_sample=6, **schedule)
        assert rows == sorted(set(rows))
        assert set(rows) <= set(eligible)
        assert [int(trunk.samples[row]) for row in rows] == [0] * 6 + [1] * 6
        assert (tier >= 0).nonzero()[:, 0].tolist() == eligible
        for row in eligible:
            assert int(tier[row]) == min(2, int(entropies[row] / 0.5) - 1)
        seen |= set(rows)
    assert seen == set(eligible)


@pytest.mark.parametrize(("answer", "left_out"), [("next", [10]), ("boxed", [3, 5, 10])])
def test_what_no_answer_can_say_is_never_chosen_and_in_boxes_counted(answer, left_out):
    """Token 3 is a brace, 5 half of a character and 10 the end of thought."""
    run = tiny_run()
    template = dataclasses.replace(run.prompt.template, answer=answer)
    words = [*BYTES[:3], b"{", BYTES[4], b"\xc3", *BYTES[6:]]
    prompt = dataclasses.replace(run.prompt, template=template, bytes_of=words)
    run = dataclasses.replace(run, prompt=prompt)
    text = [2, 3, 4, 5, 6, 10, 7, 1, 3, 8, 9, 2, 11, 3, 0, 4, 5, 2]
    (sample,) = build_trunk(
        UserBatch(
            torch.tensor([text[:-1]]),
            torch.arange(len(text) - 1)[None],
            torch.tensor([text[1:]]),
            torch.ones(1, len(text) - 1),
        ),
        [0],
        preamble=[],
        end_of_document=0,
        separate_documents=True,
    )
    own = [ReasonedSample(sample)]
    schedule = tiny_schedule(positions_per_sample=99)
    tier = choose(run, own, torch.ones(len(sample)), THRESHOLDS, schedule)
    readable = [row for row, label in enumerate(text[1:]) if words[label]]
    said = [row for row in readable if text[row + 1] not in left_out]
    assert (tier >= 0).nonzero()[:, 0].tolist() == said
    assert [position.row for position in own[0].positions] == said
    counted = {"rmt unanswerable": (len(readable) - len(said), len(readable))}
    assert answer_metrics(own, prompt) == (counted if answer == "boxed" else {})


def test_the_choice_depends_on_sample_and_iteration_but_not_on_preamble_or_neighbours():
    choices = {}
    for preamble in ([], [9, 9, 9]):
        trunk = tiny_trunk(preamble)
        rows, _ = _chosen(trunk, _entropies(trunk))
        choices[len(preamble)] = [(int(trunk.samples[r]), int(trunk.columns[r])) for r in rows]
    assert choices[0] == choices[3]

    trunk = tiny_trunk()
    rows, _ = _chosen(trunk, _entropies(trunk), (7, 9))
    columns = [(int(trunk.samples[r]), int(trunk.columns[r])) for r in rows]
    assert columns[:4] == choices[0][:4]
    assert columns[4:] != choices[0][4:]
    rows, _ = _chosen(trunk, _entropies(trunk), iteration=1)
    assert [(int(trunk.samples[r]), int(trunk.columns[r])) for r in rows] != choices[0]


def test_no_position_of_a_plain_sample_is_chosen_and_its_entropies_count_in_no_quantile():
    trunk = tiny_trunk()
    told, other = trunk.split()
    plain = dataclasses.replace(other, plain=True)
    entropies = _entropies(trunk)
    reasoned = [ReasonedSample(told), ReasonedSample(plain)]
    run = tiny_run(skip_sources=("web",))
    tier = choose(run, reasoned, entropies, THRESHOLDS, tiny_schedule())
    assert (tier[len(told) :] == -1).all()
    rows, tier_of_told = _chosen(trunk, entropies)
    assert [at.row for at in reasoned[0].positions] == [row for row in rows if row < len(told)]
    assert reasoned[1].positions == []
    assert torch.equal(tier[: len(told)], tier_of_told[: len(told)])
    own = rmt_step.MicroBatch(reasoned, 0, entropies=entropies)
    assert torch.equal(rmt_step._labelled(own), entropies[: len(told)][told.labelled])
    assert source_metrics(reasoned, run.settings) == {"rmt skipped samples": (1.0, 2.0)}
    assert source_metrics(reasoned, tiny_run().settings) == {}


def test_what_lies_above_the_ceiling_is_never_chosen_and_counted():
    trunk = tiny_trunk()
    entropies = _entropies(trunk)
    free, tier_of_all = _chosen(trunk, entropies, positions_per_sample=99)
    rows, tier = _chosen(trunk, entropies, ceiling=1.7, positions_per_sample=99)
    assert rows == [row for row in free if entropies[row] <= 1.7]
    assert 0 < len(rows) < len(free)
    assert torch.equal(tier, tier_of_all.masked_fill(entropies > 1.7, -1))

    samples = reasoned(trunk, [], None)
    labelled = torch.cat([of.sample.labelled for of in samples])
    predictions = torch.zeros(len(trunk), dtype=torch.int64)
    of_trunk = (samples, entropies, predictions, tier, tiny_schedule())
    above = trunk_metrics(*of_trunk, ceiling=1.7)["rmt above entropy ceiling"]
    assert above == (float((entropies[labelled] > 1.7).sum()), float(labelled.sum()))
    assert "rmt above entropy ceiling" not in trunk_metrics(*of_trunk, ceiling=None)


@pytest.mark.usefixtures("single_process_megatron")
def test_quantiles_give_each_tier_its_share_whatever_the_entropies():
    """To the width of a bin of the histogram, and logged."""
    trunk = tiny_trunk()
    labelled = torch.cat([of.sample.labelled for of in reasoned(trunk, [], None)])
    settings = Settings(threshold_quantiles=(0.4, 0.6, 0.9))
    for scale in (0.3, 1.0, 4.0):
        entropies = _entropies(trunk) * scale
        found = EntropyHistogram(entropies[labelled])
        thresholds = thresholds_of_step(settings, found)
        ordered = entropies[labelled].sort().values
        for share, threshold in zip((0.4, 0.6, 0.9), thresholds, strict=True):
            exact = float(ordered[-int(-share * len(ordered) // 1) - 1])
            assert exact - 0.01 <= threshold <= exact
        _, tier = _chosen(trunk, entropies, thresholds=thresholds)
        chosen = tier >= 0
        assert torch.equal(entropies[chosen] >= thresholds[2], tier[chosen] == 2)
        logged = batch_metrics(settings, found, thresholds)
        names = ("easy", "medium", "hard")
        assert [logged[f"rmt threshold {name}"][0] for name in names] == [*thresholds]
        assert thresholds_of_step(Settings(), found) == THRESHOLDS
        assert "rmt threshold easy" not in batch_metrics(Settings(), found, THRESHOLDS)


def test_a_sample_without_uncertain_tokens_has_no_position():
    trunk = tiny_trunk()
    entropies = _entropies(trunk)
    entropies[trunk.samples == 0] = 0.49
    rows, _ = _chosen(trunk, entropies)
    assert len(rows) == 4
    assert trunk.samples[rows].unique().tolist() == [1]


def test_a_selection_reads_the_text_before_each_position():
    trunk, seen = tiny_trunk(), []

    def select(of: Candidates) -> list[int]:
        seen.extend(of.trunk(row) for row in range(len(of.tiers)))
        return []

    run = dataclasses.replace(tiny_run(), select=select)
    choose(run, reasoned(trunk, [], None), _entropies(trunk), THRESHOLDS, tiny_schedule())
    texts = [
        b"" if trunk.columns[row] < 0 else BYTES[trunk.tokens[row]] for row in range(len(trunk))
    ]
    first = trunk.document_first.tolist()
    assert seen == [b"".join(texts[first[row] : row + 1]) for row in range(len(trunk))]


@pytest.mark.parametrize("rows", [[3, 2], [2, 2], [-1], [10_000], [0]], ids=str)
def test_a_selection_that_returns_what_may_not_be_chosen_is_refused(rows):
    trunk = tiny_trunk()
    run = dataclasses.replace(tiny_run(), select=lambda candidates: rows)
    entropies = torch.full((len(trunk),), 2.0)
    # Row 0 is the prompt's.
    with pytest.raises(DoorError, match=r"--rmt-select tiers returned \[.* each once\."):
        choose(run, reasoned(trunk, [], None), entropies, THRESHOLDS, tiny_schedule())


def _grow(of: Scored) -> Tree:
    return grow_tree(of.reasoned, longest_position=200, device=torch.device("cpu"))


@pytest.mark.parametrize("warm_up", [False, True])
def test_weights_hold_the_means_of_the_global_batch(warm_up):
    of = scored(warm_up=warm_up)
    tree = _grow(of)
    positions = [position for sample in of.reasoned for position in sample.positions]
    weights = loss_weights(positions, tree, 6.0, 50.0, of.schedule)
    token = tree.trunk_predictions
    torch.testing.assert_close(weights.ntp[:token], tree.ntp_mask / 50)
    assert not weights.ntp[token:].any()
    assert not torch.stack([weights.policy, weights.supervised])[:, :token].any()
    for position in positions:
        for rollout, advantage in zip(position.rollouts, position.advantages, strict=True):
            for drawn in rollout.drawn.tolist():
                policy = advantage / rollout.drawn.sum() / 12
                written = 1 / max(1, (~rollout.drawn).sum()) / 12
                assert float(weights.policy[token]) == pytest.approx(policy * drawn)
                assert float(weights.supervised[token]) == pytest.approx(
                    written * (warm_up and not drawn)
                )
                token += 1
    assert token == len(weights.policy) == len(weights.supervised)


def test_thought_and_answer_from_the_text_weigh_the_same():
    run, trunk = tiny_run(), tiny_trunk([])
    samples = reasoned(trunk, readable_rows(trunk, 3), None)
    positions = [position for of in samples for position in of.positions]
    for of in samples:
        for position in of.positions:
            position.rollouts = [response_from_text(run.prompt, of.sample, position.row, 3)[0]]
    schedule = tiny_schedule(budget=3, group=1, warm_up=True, thought_from_text=True)
    tree = _grow(score(run, schedule, samples))
    weights = loss_weights(positions, tree, 6.0, 50.0, schedule)
    assert not weights.policy.any()
    # Three tokens of thought, then its end and the answer; 6 positions in the global batch.
    expected = [1 / 3 / 6] * 3 + [1 / 2 / 6] * 2
    on_responses = weights.supervised[tree.trunk_predictions :]
    torch.testing.assert_close(on_responses, torch.tensor(expected * 3))


def test_each_position_is_asked_for_the_budget_of_its_tier():
    trunk = tiny_trunk()
    samples = reasoned(trunk, [], None)
    schedule = tiny_schedule(probabilities=None, positions_per_sample=12, tier_budgets=(2, 4, 12))
    tier = choose(tiny_run(), samples, _entropies(trunk), THRESHOLDS, schedule)
    found = {}
    for of, own in zip(samples, tier.split([len(of.sample) for of in samples]), strict=True):
        for position in of.positions:
            found.setdefault(int(own[position.row]), set()).add(
                (position.budget, tuple(position.stem))
            )
    assert found == {0: {(2, (2,))}, 1: {(4, (4,))}, 2: {(12, (1, 2))}}


def test_every_token_of_a_tree_is_counted_once():
    of = scored()
    of.reasoned[0].positions[1].stem = [2, 3, 4]
    tree = _grow(of)
    metrics = size_metrics(of.reasoned, tree, pad_tree(tree, 128), None, 4.0)
    lengths = [len(rollout) for sample in of.reasoned for rollout in sample.rollouts]
    assert metrics["rmt trunk tokens"] == (sum(len(s.sample) for s in of.reasoned), 0.25)
    assert metrics["rmt stem tokens"] == (1 + 3, 0.25)
    assert metrics["rmt branch tokens"] == (sum(length - 1 for length in lengths), 0.25)
    counted = [metrics[f"rmt {part} tokens"][0] for part in ("trunk", "stem", "branch")]
    assert sum(counted) == tree.visibility.tokens


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize(
    ("fp8", "sequence_parallel", "multiple"),
    [(None, False, 1), (None, True, 2), ("e4m3", False, 128), ("hybrid", True, 256)],
)
def test_trees_are_padded_to_what_fp8_and_sequence_parallel_ranks_want(
    fp8: str | None, sequence_parallel: bool, multiple: int
):
    args = Namespace(fp8=fp8, sequence_parallel=sequence_parallel, tensor_model_parallel_size=2)
    tree = _grow(scored())
    odd = pad_tree(tree, tree.tokens.shape[0] + 1 - tree.tokens.shape[0] % 2)
    for aligned in rmt_step._aligned(args, [tree, odd]):
        size = aligned.tokens.shape[0]
        assert size % multiple == 0
        assert 0 <= size - tree.visibility.tokens <= multiple
        assert aligned.visibility.tokens == tree.visibility.tokens


def test_padding_and_tokens_above_the_limit_are_reported():
    of = scored()
    tree = _grow(of)
    tokens = tree.visibility.tokens
    padded = pad_tree(tree, tokens + 28)
    unlimited = size_metrics(of.reasoned, padded, padded, None, 4.0)
    assert unlimited["rmt padding"] == (28, tokens + 28)
    assert unlimited["rmt tokens above limit"] == (0, 1)
    limited = size_metrics(of.reasoned, padded, padded, tokens - 3, 4.0)
    assert limited["rmt tokens above limit"] == (3, 1)

    grown = grow_tree([], longest_position=200, device=torch.device("cpu"))
    empty = size_metrics([], grown, grown, 5, 4.0)
    assert empty["rmt padding"] == (1, 1)
    assert empty["rmt tokens above limit"] == (0, 1)
    assert [count for name, (count, _) in empty.items() if name.endswith("tokens")] == [0, 0, 0]
