"""Reading, rewarding and truncation of responses, by hand."""

import dataclasses

import pytest
import torch

from megatron_rmt.prompt.response import Response
from megatron_rmt.rollout.trunk import Sample
from megatron_rmt.update.report import is_truncated
from megatron_rmt.update.scoring import continuation, text_before
from megatron_rmt.update.tree import ChosenPosition, ReasonedSample
from megatron_rmt.update.warm_up import response_from_text
from tests.packed import build_trunk
from tests.tiny_step import (
    BYTES,
    TEMPLATE,
    rollout,
    score,
    scored,
    tiny_prompt,
    tiny_run,
    tiny_schedule,
)


def _sample(
    tokens: list[int], preamble: list[int] = (), loss_mask: list[float] | None = None
) -> Sample:
    """One sample, its documents ended by token 0."""
    text = torch.tensor([tokens])
    (sample,) = build_trunk(
        text[:, :-1],
        torch.arange(len(tokens) - 1)[None],
        text[:, 1:],
        torch.ones(1, len(tokens) - 1) if loss_mask is None else torch.tensor([loss_mask]),
        preamble=list(preamble),
        end_of_document=0,
        separate_documents=True,
    ).split()
    return sample


def test_the_continuation_stops_at_the_documents_end_and_at_tokens_without_bytes():
    sample = _sample([2, 3, 4, 1, 5, 6, 0, 7, 8, 9, 2])
    found = [continuation(tiny_prompt(), sample, row) for row in range(10)]
    assert found[:3] == [[3, 4], [4], []]
    assert found[3:6] == [[5, 6], [6], []]
    assert found[7:] == [[8, 9, 2], [9, 2], [2]]


@pytest.mark.parametrize(
    ("tokens", "loss_mask"),
    [
        ([2, 3, 4, 5, 9, 9, 9], [1, 1, 1, 0, 0, 0]),
        ([2, 3, 4, 5, -100, -100, -100], [1, 1, 1, 1, 1, 1]),
        ([2, 3, 4, 5, -100, 9, -100], [1, 1, 1, 0, 0, 0]),
    ],
    ids=["padding with bytes", "-100 with a loss", "-100 without"],
)
def test_the_truth_and_a_thought_from_the_text_end_before_padding(tokens, loss_mask):
    sample = _sample(tokens, loss_mask=loss_mask)
    assert [continuation(tiny_prompt(), sample, row) for row in range(4)] == [
        [3, 4, 5],
        [4, 5],
        [5],
        [],
    ]
    response, _ = response_from_text(tiny_run().prompt, sample, 1, 6)
    assert response.tokens.tolist() == [4, 5, 10, 4]


def test_the_text_before_is_that_of_the_document_without_the_preamble():
    sample = _sample([2, 3, 4, 0, 7, 8, 9, 2], preamble=[9, 9])
    assert text_before(sample, 3) == [2, 3]
    assert text_before(sample, 9) == [7, 8]


def test_rewards_and_advantages_by_hand():
    of = scored(answer_tokens=1)
    # Budget 4: thoughts of 2, 8 (never closed), 1 and 4 tokens are worth 1/2, 0, 1/4 and 1.
    rewards = [[0.75 + 0.25 * 0.5, 0.0], [0.25 * 0.25, 0.75 + 0.25 * 1.0]]
    assert of.advantages == [[1.0, -1.0], [-1.0, 1.0]]
    assert of.rewards == [pytest.approx(own) for own in rewards]
    assert of.metrics["rmt reward"] == (pytest.approx(sum(map(sum, rewards))), 4)
    assert of.metrics["rmt match rate"] == (2, 4)
    assert of.metrics["rmt well-formed rate"] == (3, 4)
    assert of.metrics["rmt closed by itself"] == (2, 4)
    assert of.metrics["rmt thought length"] == (15, 4)
    assert of.metrics["rmt length reward"] == (1.75, 4)
    assert of.metrics["rmt zero-variance groups"] == (0, 2)
    assert of.metrics["rmt truncated"] == (1, 4)
    assert of.metrics["rmt budget"] == (8, 2)


def test_each_position_is_measured_by_its_own_budget():
    of = scored(answer_tokens=1)
    of.reasoned[0].positions[1].budget = 2
    again = score(of.run, of.schedule, of.reasoned)
    # Thoughts of 2 and 8 tokens for 4, of 1 and 4 for 2.
    assert again.evidence.budget.tolist() == [[4.0], [2.0]]
    assert again.rewards == [[0.75 + 0.25 * 0.5, 0.0], [0.25 * 0.5, 0.75]]
    assert again.metrics["rmt length reward"] == (1.0, 4)
    assert again.metrics["rmt budget"] == (6, 2)
    # Both of 8 and of 4 tokens were ended by the bound, the latter by force.
    assert again.metrics["rmt truncated"] == (2, 4)


@pytest.mark.parametrize(
    "earned",
    [
        torch.ones(2),
        torch.ones(2, 1),
        torch.ones(1, 2),
        [[1.0, 1.0]] * 2,
        torch.full((2, 2), torch.nan),
    ],
    ids=["positions", "one each", "group", "a list", "not a number"],
)
def test_a_reward_of_another_shape_or_without_a_value_is_refused(earned):
    of = scored()
    run = dataclasses.replace(of.run, reward=lambda evidence: earned)
    with pytest.raises(ValueError, match=r"--rmt-reward match returned .* here \[2, 2\]\."):
        score(run, of.schedule, of.reasoned)


def test_a_reward_does_not_report_under_a_name_of_rmts_own():
    def reward(evidence):
        evidence.report("match rate", evidence.thought_lengths)
        return evidence.thought_lengths

    of = scored()
    with pytest.raises(ValueError, match="reports rmt match rate, which RMT logs by itself"):
        score(dataclasses.replace(of.run, reward=reward), of.schedule, of.reasoned)


def test_what_a_reward_reports_is_logged_as_a_mean():
    def reward(evidence):
        evidence.report("thoughts", evidence.thought_lengths)
        return evidence.thought_lengths

    of = scored()
    metrics = score(dataclasses.replace(of.run, reward=reward), of.schedule, of.reasoned).metrics
    assert metrics["rmt thoughts"] == (15, 4)


def test_without_the_length_reward_the_match_is_all():
    metrics = scored(no_length_reward=True, answer_tokens=1).metrics
    assert metrics["rmt reward"] == (2, 4)


def test_the_warm_up_rewards_the_length_alone_and_judges_nothing():
    of = scored(warm_up=True)
    # Thoughts of 2 and 8, 1 and 4 tokens for a budget of 4, whatever the answers.
    assert of.advantages == [[1.0, -1.0], [-1.0, 1.0]]
    right = of.reasoned[0].positions[1].rollouts[1]
    right.tokens[5] = 2 if right.tokens[5] != 2 else 3
    assert score(of.run, of.schedule, of.reasoned).advantages == of.advantages
    flat = scored(warm_up=True, no_length_reward=True)
    assert not any(map(any, flat.advantages))
    for name in (
        "rmt match rate",
        "rmt well-formed rate",
        "rmt reward",
        "rmt zero-variance groups",
    ):
        assert of.metrics[name] == (0, 0)


def test_responses_from_the_text_are_its_next_tokens_and_the_answer():
    sample = _sample([2, 3, 4, 5, 6, 7, 0, 8, 9, 2, 3])
    run, rows = tiny_run(), [0, 3, 8]
    responses = [response_from_text(run.prompt, sample, row, 3)[0] for row in rows]
    # Thought, its end (10), the next token; the first document ends behind token 7.
    assert [own.tokens.tolist() for own in responses] == [
        [3, 4, 5, 10, 3],
        [6, 7, 10, 6],
        [2, 3, 10, 2],
    ]
    assert not any(own.drawn.any() for own in responses)

    schedule = tiny_schedule(budget=3, group=1, warm_up=True, thought_from_text=True)
    positions = [
        ChosenPosition(row, 3, [3], [own]) for row, own in zip(rows, responses, strict=True)
    ]
    of = score(run, schedule, [ReasonedSample(sample, positions)])
    assert of.advantages == [[0.0]] * 3
    for name in ("rmt match rate", "rmt reward", "rmt thought length", "rmt closed by itself"):
        assert of.metrics[name] == (0, 0)


def test_a_written_thought_is_as_long_as_it_was_written_whatever_its_text_says():
    """The text has an end of thought (10) of its own."""
    sample = _sample([2, 3, 10, 4, 5, 6])
    rollout, response = response_from_text(tiny_run().prompt, sample, 0, 4)
    assert rollout.tokens.tolist() == [3, 10, 4, 5, 10, 3]
    assert response == Response(4, closed=True, well_formed=True, prediction=BYTES[3])


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
    prompt = tiny_prompt(template=dataclasses.replace(TEMPLATE, answer=template))
    found = is_truncated(rollout(tokens, drawn), prompt.read(tokens), 4, prompt.stop)
    assert found == truncated
