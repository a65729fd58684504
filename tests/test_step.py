"""The decisions of a step: sample numbers, positions, weights, sizes."""

from argparse import Namespace

import pytest
import torch
from megatron.core import parallel_state
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch import Tensor

from megatron_rmt import step as rmt_step
from megatron_rmt.rollout.trunk import NO_LABEL, Trunk
from megatron_rmt.step import global_sample_indices
from megatron_rmt.update.packing import TreeSource, empty_source
from megatron_rmt.update.scoring import score
from megatron_rmt.update.tree import grow_tree, pad_tree
from megatron_rmt.update.warm_up import responses_from_text
from tests.distributed import run_distributed
from tests.tiny_step import (
    BYTES,
    readable_rows,
    scored,
    step_args,
    step_plan,
    tiny_training,
    tiny_trunk,
)


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
    """By sample and column, so that they do not depend on the head."""
    generator = torch.Generator().manual_seed(1)
    return (2.2 * torch.rand(2, 200, generator=generator))[trunk.samples, trunk.columns]


@pytest.mark.parametrize("probabilities", [(0.6, 0.3, 0.1), None], ids=["curriculum", "uniform"])
def test_chosen_rows_are_labelled_unmasked_readable_and_uncertain(probabilities):
    training, trunk = tiny_training(step_args()), tiny_trunk()
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
        step = step_plan(iteration, probabilities=probabilities, positions_per_sample=6)
        rows, tier = rmt_step._choose(training, trunk, entropies, [7, 8], step)
        assert rows == sorted(set(rows))
        assert set(rows) <= set(eligible)
        assert [int(trunk.samples[row]) for row in rows] == [0] * 6 + [1] * 6
        assert (tier >= 0).nonzero()[:, 0].tolist() == eligible
        for row in eligible:
            assert int(tier[row]) == min(2, int(entropies[row] / 0.5) - 1)
        seen |= set(rows)
    assert seen == set(eligible)


def test_the_choice_depends_on_sample_and_iteration_but_not_on_head_or_neighbours():
    training = tiny_training(step_args())
    choices = {}
    for head in ([], [9, 9, 9]):
        trunk = tiny_trunk(head)
        rows, _ = rmt_step._choose(training, trunk, _entropies(trunk), [7, 8], step_plan())
        choices[len(head)] = [(int(trunk.samples[r]), int(trunk.columns[r])) for r in rows]
    assert choices[0] == choices[3]

    trunk = tiny_trunk()
    rows, _ = rmt_step._choose(training, trunk, _entropies(trunk), [7, 9], step_plan())
    columns = [(int(trunk.samples[r]), int(trunk.columns[r])) for r in rows]
    assert columns[:4] == choices[0][:4]
    assert columns[4:] != choices[0][4:]
    rows, _ = rmt_step._choose(training, trunk, _entropies(trunk), [7, 8], step_plan(iteration=1))
    assert [(int(trunk.samples[r]), int(trunk.columns[r])) for r in rows] != choices[0]


def test_a_sample_without_uncertain_tokens_has_no_position():
    training, trunk = tiny_training(step_args()), tiny_trunk()
    entropies = _entropies(trunk)
    entropies[trunk.samples == 0] = 0.49
    rows, _ = rmt_step._choose(training, trunk, entropies, [7, 8], step_plan())
    assert len(rows) == 4
    assert trunk.samples[rows].unique().tolist() == [1]


@pytest.mark.parametrize("warm_up", [False, True])
def test_weights_hold_the_means_of_the_global_batch(warm_up):
    advantages, _, (training, trunk, rows, responses, step) = scored(warm_up=warm_up)
    tree = grow_tree(trunk, rows, [3], responses, longest_position=200, device=torch.device("cpu"))
    source = TreeSource(trunk, rows, responses, advantages)
    weights = rmt_step._weights(training, source, tree, 6.0, 50.0, step)
    torch.testing.assert_close(weights.ntp, tree.ntp_mask / 50)
    token = 0
    for position in range(2):
        for rollout in range(2):
            length = int(responses.lengths[position, rollout])
            drawn = responses.drawn[position, rollout, :length]
            for index in range(length):
                policy = float(advantages[position, rollout]) / int(drawn.sum()) / 12
                written = 1 / max(1, int((~drawn).sum())) / 12
                assert float(weights.policy[token]) == pytest.approx(policy * bool(drawn[index]))
                assert float(weights.supervised[token]) == pytest.approx(
                    written * (warm_up and not drawn[index])
                )
                token += 1
    assert token == len(weights.policy) == len(weights.supervised)


def test_thought_and_answer_from_the_text_weigh_the_same():
    training, trunk = tiny_training(step_args()), tiny_trunk([])
    rows = readable_rows(trunk, 3)
    step = step_plan(budget=3, group=1, warm_up=True, thought_from_text=True)
    responses = responses_from_text(training, trunk, rows, step)
    _, advantages, _ = score(training, trunk, rows, responses, step)
    tree = grow_tree(trunk, rows, [3], responses, longest_position=200, device=torch.device("cpu"))
    source = TreeSource(trunk, rows, responses, advantages)
    weights = rmt_step._weights(training, source, tree, 6.0, 50.0, step)
    assert not weights.policy.any()
    # Three tokens of thought, then its end and the answer; 6 positions in the global batch.
    expected = [1 / 3 / 6] * 3 + [1 / 2 / 6] * 2
    torch.testing.assert_close(weights.supervised, torch.tensor(expected * 3))


def test_every_token_of_a_tree_is_counted_once():
    _, _, (_, trunk, rows, responses, _) = scored()
    tree = grow_tree(trunk, rows, [3], responses, longest_position=200, device=torch.device("cpu"))
    metrics = rmt_step._token_metrics(trunk, pad_tree(tree, 128), len(rows), 4.0)
    assert metrics["rmt trunk tokens"] == (len(trunk), 0.25)
    assert metrics["rmt stem tokens"] == (2, 0.25)
    assert metrics["rmt branch tokens"] == (int((responses.lengths - 1).sum()), 0.25)
    assert sum(tokens for tokens, _ in metrics.values()) == tree.visibility.tokens


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize(
    ("fp8", "sequence_parallel", "multiple"),
    [(None, False, 1), (None, True, 2), ("e4m3", False, 128), ("hybrid", True, 256)],
)
def test_trees_are_padded_to_what_fp8_and_sequence_parallel_ranks_want(
    fp8: str | None, sequence_parallel: bool, multiple: int
):
    _, _, (training, trunk, rows, responses, _) = scored(
        fp8=fp8, sequence_parallel=sequence_parallel, tensor_model_parallel_size=2
    )
    tree = grow_tree(trunk, rows, [3], responses, longest_position=200, device=torch.device("cpu"))
    odd = pad_tree(tree, tree.tokens.shape[0] + 1 - tree.tokens.shape[0] % 2)
    for aligned in rmt_step._aligned(training, [tree, odd]):
        size = aligned.tokens.shape[0]
        assert size % multiple == 0
        assert 0 <= size - tree.visibility.tokens <= multiple
        assert aligned.visibility.tokens == tree.visibility.tokens


def test_padding_and_tokens_above_the_limit_are_reported():
    _, _, (_, trunk, rows, responses, _) = scored()
    tree = grow_tree(trunk, rows, [3], responses, longest_position=200, device=torch.device("cpu"))
    tokens = tree.visibility.tokens
    padded = pad_tree(tree, tokens + 28)
    unlimited = rmt_step._size_metrics(step_args(rmt_max_tokens=None), trunk, padded)
    assert unlimited == {"rmt padding": (28, tokens + 28), "rmt tokens above limit": (0, 1)}
    limited = rmt_step._size_metrics(step_args(rmt_max_tokens=tokens - 3), trunk, padded)
    assert limited["rmt tokens above limit"] == (3, 1)

    empty = empty_source(2)
    grown = grow_tree(
        empty.trunk, [], [3], empty.responses, longest_position=200, device=torch.device("cpu")
    )
    assert rmt_step._size_metrics(step_args(rmt_max_tokens=5), empty.trunk, grown) == {
        "rmt padding": (1, 1),
        "rmt tokens above limit": (0, 1),
    }
    tokens_of = rmt_step._token_metrics(empty.trunk, grown, 0, 4.0)
    assert [count for count, _ in tokens_of.values()] == [0, 0, 0]
