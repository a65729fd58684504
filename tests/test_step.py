"""The decisions of a step: schedules, sample numbers, positions, scores, weights."""

import dataclasses
import math
from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch import Tensor

from megatron_rmt import step as rmt_step
from megatron_rmt.packing import empty_source
from megatron_rmt.step import StepPlan, generating, global_sample_indices, gpt_model, plan_step
from megatron_rmt.template import ResponseGrammar, Template, read_response
from megatron_rmt.tree import NO_LABEL, Responses, Trunk, build_trunk, grow_tree, pad_tree
from tests.distributed import run_distributed
from tests.tiny_model import build_model


def _args(**changes: Any) -> Namespace:
    options = {
        "train_iters": 100,
        "rmt_initial_budget": 800,
        "rmt_minimum_budget": 1,
        "rmt_budget_decay": 0.2,
        "rmt_no_budget_decay": False,
        "rmt_curriculum_start": 0.3,
        "rmt_curriculum_end": 0.7,
        "rmt_start_probabilities": [0.6, 0.3, 0.1],
        "rmt_end_probabilities": [0.1, 0.3, 0.6],
        "rmt_no_curriculum": False,
        "rmt_warmup_iters": 0,
        "rmt_entropy_thresholds": [0.5, 1.0, 1.5],
        "rmt_positions_per_sample": 4,
        "rmt_group_size": 2,
        "rmt_answer_tokens": 3,
        "rmt_length_reward_weight": 0.25,
        "rmt_length_reward_maximum": 1.0,
        "rmt_no_length_reward": False,
    }
    return Namespace(**options | changes)


@pytest.mark.parametrize(
    ("iteration", "budget", "probabilities"),
    [
        (0, 800, (0.6, 0.3, 0.1)),
        (30, 493, (0.6, 0.3, 0.1)),
        (40, 420, (0.475, 0.3, 0.225)),
        (50, 357, (0.35, 0.3, 0.35)),
        (70, 259, (0.1, 0.3, 0.6)),
        (100, 160, (0.1, 0.3, 0.6)),
        (130, 160, (0.1, 0.3, 0.6)),
    ],
)
def test_the_schedules_follow_the_paper(iteration, budget, probabilities):
    plan = plan_step(_args(), iteration)
    assert plan.iteration == iteration
    assert plan.budget == budget == math.floor(800 * 0.2 ** (min(iteration, 100) / 100) + 1e-9)
    assert plan.probabilities == pytest.approx(probabilities)
    assert not plan.warm_up


def test_ablations_and_warm_up_of_the_schedules():
    assert plan_step(_args(rmt_no_budget_decay=True), 90).budget == 800
    assert plan_step(_args(rmt_initial_budget=2), 100).budget == 1
    assert plan_step(_args(rmt_no_curriculum=True), 0).probabilities is None
    args = _args(rmt_warmup_iters=3)
    assert [plan_step(args, iteration).warm_up for iteration in range(5)] == [1, 1, 1, 0, 0]


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


# A vocabulary of one-letter tokens: 0 is the end of the document, 1 a special token without bytes.
BYTES = [b"", b"", *(bytes([letter]) for letter in b"abcdefgh"), b"</t>", b" "]
TEMPLATE = Template("test", "", "{budget}", "</t>", "next")


def _training(args: Namespace) -> rmt_step.MidTraining:
    return rmt_step.MidTraining(
        args=args,
        model=None,
        template=TEMPLATE,
        tokenizer=None,
        bytes_of=BYTES,
        has_bytes=torch.tensor([len(text) > 0 for text in BYTES]),
        grammar=ResponseGrammar(TEMPLATE, BYTES, [0]),
        head=[9, 9],
        close=[10],
        stop=[0],
        longest_position=200,
        seed=5,
    )


def _trunk(head: list[int] = (9, 9), length: int = 40) -> Trunk:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, 10, (2, length + 1), generator=generator)
    text[0, 17] = 0
    loss_mask = (torch.rand(2, length, generator=generator) < 0.8).float()
    return build_trunk(
        text[:, :-1],
        torch.arange(length).repeat(2, 1),
        text[:, 1:],
        loss_mask,
        head=list(head),
        end_of_document=0,
        separate_documents=True,
    )


def _plan(iteration: int = 0, **changes: Any) -> StepPlan:
    options = {"budget": 4, "probabilities": (0.6, 0.3, 0.1), "warm_up": False}
    return StepPlan(iteration, **options | changes)


def _entropies(trunk: Trunk) -> Tensor:
    """By sample and column, so that they do not depend on the head."""
    generator = torch.Generator().manual_seed(1)
    return (2.2 * torch.rand(2, 200, generator=generator))[trunk.samples, trunk.columns]


@pytest.mark.parametrize("probabilities", [(0.6, 0.3, 0.1), None], ids=["curriculum", "uniform"])
def test_chosen_rows_are_labelled_unmasked_readable_and_uncertain(probabilities):
    training, trunk = _training(_args(rmt_positions_per_sample=6)), _trunk()
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
        step = _plan(iteration, probabilities=probabilities)
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
    training = _training(_args())
    choices = {}
    for head in ([], [9, 9, 9]):
        trunk = _trunk(head)
        rows, _ = rmt_step._choose(training, trunk, _entropies(trunk), [7, 8], _plan())
        choices[len(head)] = [(int(trunk.samples[r]), int(trunk.columns[r])) for r in rows]
    assert choices[0] == choices[3]

    trunk = _trunk()
    rows, _ = rmt_step._choose(training, trunk, _entropies(trunk), [7, 9], _plan())
    columns = [(int(trunk.samples[r]), int(trunk.columns[r])) for r in rows]
    assert columns[:4] == choices[0][:4]
    assert columns[4:] != choices[0][4:]
    rows, _ = rmt_step._choose(training, trunk, _entropies(trunk), [7, 8], _plan(iteration=1))
    assert [(int(trunk.samples[r]), int(trunk.columns[r])) for r in rows] != choices[0]


def test_a_sample_without_uncertain_tokens_has_no_position():
    training, trunk = _training(_args()), _trunk()
    entropies = _entropies(trunk)
    entropies[trunk.samples == 0] = 0.49
    rows, _ = rmt_step._choose(training, trunk, entropies, [7, 8], _plan())
    assert len(rows) == 4
    assert trunk.samples[rows].unique().tolist() == [1]


def test_the_continuation_stops_at_the_documents_end_and_at_tokens_without_bytes():
    text = torch.tensor([[2, 3, 4, 1, 5, 6, 0, 7, 8, 9, 2]])
    trunk = build_trunk(
        text[:, :-1],
        torch.arange(10)[None],
        text[:, 1:],
        torch.ones(1, 10),
        head=[],
        end_of_document=0,
        separate_documents=True,
    )
    training = _training(_args())
    found = [rmt_step._continuation(training, trunk, row) for row in range(10)]
    assert found[:3] == [[3, 4], [4], []]
    assert found[3:6] == [[5, 6], [6], []]
    assert found[7:] == [[8, 9, 2], [9, 2], [2]]


def _scored(warm_up: bool = False, **changes: Any) -> tuple[Tensor, dict[str, Any], tuple]:
    """Two positions, a group of two: right after 2 tokens of 4; never closed; wrong; right."""
    training, trunk = _training(_args(**changes)), _trunk([])
    labels = trunk.labels
    rows = [
        row
        for row in range(1, len(trunk) - 3)
        if all(BYTES[label] for label in labels[row : row + 3].tolist())
        and trunk.document_first[row] == trunk.document_first[row + 3]
    ][:2]
    right = [int(labels[row]) for row in rows]
    wrong = 2 if right[1] != 2 else 3
    texts = [[[2, 2, 10, right[0]], [2] * 8], [[2, 10, wrong], [2, 2, 2, 2, 10, right[1]]]]
    tokens = torch.zeros(2, 2, 8, dtype=torch.int64)
    lengths = torch.zeros(2, 2, dtype=torch.int64)
    for position, group in enumerate(texts):
        for rollout, text in enumerate(group):
            tokens[position, rollout, : len(text)] = torch.tensor(text)
            lengths[position, rollout] = len(text)
    sampled = torch.ones(2, 2, 8, dtype=torch.bool)
    sampled[1, 1, 4] = False
    responses = Responses(tokens, lengths, sampled, torch.zeros(2, 2, 8))
    step = _plan(warm_up=warm_up)
    advantages, metrics = rmt_step._score(training, trunk, rows, responses, step)
    return advantages, metrics, (training, trunk, rows, responses, step)


def test_rewards_and_advantages_by_hand():
    advantages, metrics, _ = _scored(rmt_answer_tokens=1)
    # Budget 4: thoughts of 2, 8 (never closed), 1 and 4 tokens are worth 1/2, 0, 1/4 and 1.
    rewards = [[0.75 + 0.25 * 0.5, 0.0], [0.25 * 0.25, 0.75 + 0.25 * 1.0]]
    torch.testing.assert_close(advantages, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    total = sum(map(sum, rewards))
    assert metrics["rmt reward"] == (pytest.approx(total), 4)
    assert metrics["rmt match rate"] == (2, 4)
    assert metrics["rmt well-formed rate"] == (3, 4)
    assert metrics["rmt closed by itself"] == (2, 4)
    assert metrics["rmt thought length"] == (15, 4)
    assert metrics["rmt length reward"] == (1.75, 4)
    assert metrics["rmt zero-variance groups"] == (0, 2)
    assert metrics["rmt truncated"] == (1, 4)
    assert metrics["rmt budget"] == (8, 2)


def test_without_the_length_reward_the_match_is_all():
    _, metrics, _ = _scored(rmt_no_length_reward=True, rmt_answer_tokens=1)
    assert metrics["rmt reward"] == (2, 4)


def test_the_warm_up_rewards_the_length_alone_and_judges_nothing():
    advantages, metrics, (training, *others) = _scored(warm_up=True)
    # Thoughts of 2 and 8, 1 and 4 tokens for a budget of 4, whatever the answers.
    torch.testing.assert_close(advantages, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    *others, step = others
    wrong = dataclasses.replace(others[-1], tokens=others[-1].tokens.clone())
    wrong.tokens[1, 1, 5] = wrong.tokens[1, 0, 2]
    unmoved, _ = rmt_step._score(training, *others[:-1], wrong, step)
    assert torch.equal(unmoved, advantages)
    assert not _scored(warm_up=True, rmt_no_length_reward=True)[0].any()
    for name in (
        "rmt match rate",
        "rmt well-formed rate",
        "rmt reward",
        "rmt zero-variance groups",
    ):
        assert metrics[name] == (0, 0)


@pytest.mark.parametrize("warm_up", [False, True])
def test_weights_hold_the_means_of_the_global_batch(warm_up):
    advantages, _, (training, trunk, rows, responses, step) = _scored(warm_up=warm_up)
    tree = grow_tree(trunk, rows, [3], responses, longest_position=200, device=torch.device("cpu"))
    weights = rmt_step._weights(training, tree, advantages, 6.0, 50.0, step)
    torch.testing.assert_close(weights.ntp, tree.ntp_mask / 50)
    token = 0
    for position in range(2):
        for rollout in range(2):
            length = int(responses.lengths[position, rollout])
            drawn = responses.sampled[position, rollout, :length]
            for index in range(length):
                policy = float(advantages[position, rollout]) / int(drawn.sum()) / 12
                written = 1 / max(1, int((~drawn).sum())) / 12
                assert float(weights.policy[token]) == pytest.approx(policy * bool(drawn[index]))
                assert float(weights.supervised[token]) == pytest.approx(
                    written * (warm_up and not drawn[index])
                )
                token += 1
    assert token == len(weights.policy) == len(weights.supervised)


@pytest.mark.usefixtures("single_process_megatron")
def test_generating_comes_back_to_training_also_after_an_error():
    model = build_model().train()
    with generating(model):
        assert not model.training
    assert model.training
    with pytest.raises(ZeroDivisionError), generating(model):
        1 / 0  # noqa: B018
    assert model.training
    assert all(module.training for module in model.modules())
    with generating(model.eval()):
        pass
    assert not model.training


@pytest.mark.usefixtures("single_process_megatron")
def test_the_model_is_found_inside_its_wrappers_or_refused():
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    model = build_model()
    assert gpt_model([model]) is gpt_model([Wrapper(Wrapper(model))]) is model
    with pytest.raises(ValueError, match=r"this rank holds 2 model chunks; leave out virtual"):
        gpt_model([model, model])
    with pytest.raises(ValueError, match=r"the model is a Linear; RMT trains a GPTModel"):
        gpt_model([Wrapper(torch.nn.Linear(1, 1))])


@pytest.mark.parametrize(
    ("tokens", "sampled", "template", "truncated"),
    [
        ([2, 3, 10, 4], [1, 1, 1, 1], "next", False),
        ([2] * 8, [1] * 8, "next", True),
        ([2] * 8 + [10, 4], [1] * 8 + [0, 1], "next", True),
        ([2] * 8 + [10, 4], [1] * 10, "next", False),
        ([2, 2, 0], [1, 1, 1], "next", False),
        ([2, 10, 3, 3, 3], [1] * 5, "boxed", True),
        ([2, 10, 3, 3, 0], [1] * 5, "boxed", False),
    ],
    ids=[
        "closed itself",
        "given up at the bound",
        "closed by force",
        "closed itself at the bound",
        "text ended in the thought",
        "answer ran out of tokens",
        "text ended in the answer",
    ],
)
def test_a_response_is_truncated_where_a_bound_ended_it(tokens, sampled, template, truncated):
    training = _training(_args())
    training = dataclasses.replace(
        training, template=dataclasses.replace(TEMPLATE, answer=template)
    )
    responses = Responses(
        torch.tensor([[tokens]]),
        torch.tensor([[len(tokens)]]),
        torch.tensor([[sampled]]).bool(),
        torch.zeros(1, 1, len(tokens)),
    )
    response = read_response(tokens, training.template, BYTES, [0], 3)
    found = rmt_step._is_truncated(training, response, responses, 0, 0, _plan())
    assert found == truncated


def test_every_token_of_a_tree_is_counted_once():
    _, _, (_, trunk, rows, responses, _) = _scored()
    tree = grow_tree(trunk, rows, [3], responses, longest_position=200, device=torch.device("cpu"))
    metrics = rmt_step._token_metrics(trunk, pad_tree(tree, 128), len(rows), 4.0)
    assert metrics["rmt trunk tokens"] == (len(trunk), 0.25)
    assert metrics["rmt stem tokens"] == (2, 0.25)
    assert metrics["rmt branch tokens"] == (int((responses.lengths - 1).sum()), 0.25)
    assert sum(tokens for tokens, _ in metrics.values()) == tree.plan.tokens


@pytest.mark.usefixtures("single_process_megatron")
@pytest.mark.parametrize("precision", [None, "fp8", "fp4"])
def test_quantized_weights_are_made_again_before_and_after_rollouts(precision):
    """Else rollouts would read the weights of the step before, and the update those that were made
    without gradient."""
    model = build_model()
    layer = model.decoder.layers[1].mlp.linear_fc1
    # What Transformer Engine's layers have.
    layer.is_first_microbatch = False
    layer._fp8_workspaces = {"weight": torch.ones(1)}
    if precision is not None:
        setattr(model.config, precision, "e4m3")
    with generating(model):
        assert layer.is_first_microbatch == (precision is not None)
        assert layer._fp8_workspaces
    assert bool(layer._fp8_workspaces) == (precision is None)


def test_padding_and_tokens_above_the_limit_are_reported():
    _, _, (_, trunk, rows, responses, _) = _scored()
    tree = grow_tree(trunk, rows, [3], responses, longest_position=200, device=torch.device("cpu"))
    tokens = tree.plan.tokens
    padded = pad_tree(tree, tokens + 28)
    unlimited = rmt_step._size_metrics(_args(rmt_max_tokens=None), trunk, padded)
    assert unlimited == {"rmt padding": (28, tokens + 28), "rmt tokens above limit": (0, 1)}
    limited = rmt_step._size_metrics(_args(rmt_max_tokens=tokens - 3), trunk, padded)
    assert limited["rmt tokens above limit"] == (3, 1)

    empty = empty_source(2)
    grown = grow_tree(
        empty.trunk, [], [3], empty.responses, longest_position=200, device=torch.device("cpu")
    )
    assert rmt_step._size_metrics(_args(rmt_max_tokens=5), empty.trunk, grown) == {
        "rmt padding": (1, 1),
        "rmt tokens above limit": (0, 1),
    }
    tokens_of = rmt_step._token_metrics(empty.trunk, grown, 0, 4.0)
    assert [count for count, _ in tokens_of.values()] == [0, 0, 0]
