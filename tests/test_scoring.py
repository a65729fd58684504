"""Reading, rewarding and truncation of responses, by hand."""

import dataclasses

import pytest
import torch

from megatron_rmt.prompt.response import read_response
from megatron_rmt.rollout.responses import Responses
from megatron_rmt.rollout.trunk import Trunk, build_trunk
from megatron_rmt.update import scoring
from tests.tiny_step import BYTES, TEMPLATE, scored, step_args, step_plan, tiny_training


def _trunk(tokens: list[int]) -> Trunk:
    """One sample, its documents ended by token 0."""
    text = torch.tensor([tokens])
    return build_trunk(
        text[:, :-1],
        torch.arange(len(tokens) - 1)[None],
        text[:, 1:],
        torch.ones(1, len(tokens) - 1),
        head=[],
        end_of_document=0,
        separate_documents=True,
    )


def test_the_continuation_stops_at_the_documents_end_and_at_tokens_without_bytes():
    trunk = _trunk([2, 3, 4, 1, 5, 6, 0, 7, 8, 9, 2])
    training = tiny_training(step_args())
    found = [scoring.continuation(training, trunk, row) for row in range(10)]
    assert found[:3] == [[3, 4], [4], []]
    assert found[3:6] == [[5, 6], [6], []]
    assert found[7:] == [[8, 9, 2], [9, 2], [2]]


def test_rewards_and_advantages_by_hand():
    advantages, metrics, _ = scored(rmt_answer_tokens=1)
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
    _, metrics, _ = scored(rmt_no_length_reward=True, rmt_answer_tokens=1)
    assert metrics["rmt reward"] == (2, 4)


def test_the_warm_up_rewards_the_length_alone_and_judges_nothing():
    advantages, metrics, (training, *others) = scored(warm_up=True)
    # Thoughts of 2 and 8, 1 and 4 tokens for a budget of 4, whatever the answers.
    torch.testing.assert_close(advantages, torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    *others, step = others
    wrong = dataclasses.replace(others[-1], tokens=others[-1].tokens.clone())
    wrong.tokens[1, 1, 5] = wrong.tokens[1, 0, 2]
    _, unmoved, _ = scoring.score(training, *others[:-1], wrong, step)
    assert torch.equal(unmoved, advantages)
    assert not scored(warm_up=True, rmt_no_length_reward=True)[0].any()
    for name in (
        "rmt match rate",
        "rmt well-formed rate",
        "rmt reward",
        "rmt zero-variance groups",
    ):
        assert metrics[name] == (0, 0)


def test_responses_from_the_text_are_its_next_tokens_and_the_answer():
    trunk = _trunk([2, 3, 4, 5, 6, 7, 0, 8, 9, 2, 3])
    training = tiny_training(step_args())
    step = step_plan(budget=3, group=1, warm_up=True, thought_from_text=True)
    responses = scoring.responses_from_text(training, trunk, [0, 3, 8], step)
    # Thought, its end (10), the next token; the first document ends behind token 7.
    assert responses.lengths.tolist() == [[5], [4], [4]]
    assert responses.tokens[0, 0].tolist() == [3, 4, 5, 10, 3]
    assert responses.tokens[1, 0].tolist() == [6, 7, 10, 6, 0]
    assert responses.tokens[2, 0].tolist() == [2, 3, 10, 2, 0]
    assert not responses.drawn.any()

    _, advantages, metrics = scoring.score(training, trunk, [0, 3, 8], responses, step)
    assert advantages.tolist() == [[0.0]] * 3
    for name in ("rmt match rate", "rmt reward", "rmt thought length", "rmt closed by itself"):
        assert metrics[name] == (0, 0)


@pytest.mark.parametrize(
    ("tokens", "drawn", "template", "truncated"),
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
def test_a_response_is_truncated_where_a_bound_ended_it(tokens, drawn, template, truncated):
    training = tiny_training(step_args())
    training = dataclasses.replace(
        training, template=dataclasses.replace(TEMPLATE, answer=template)
    )
    responses = Responses(
        torch.tensor([[tokens]]),
        torch.tensor([[len(tokens)]]),
        torch.tensor([[drawn]]).bool(),
        torch.zeros(1, 1, len(tokens)),
    )
    response = read_response(tokens, training.template, BYTES, [0], 3)
    found = scoring.is_truncated(training, response, responses, 0, 0, step_plan())
    assert found == truncated
