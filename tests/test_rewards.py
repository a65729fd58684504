"""Rewards, against numbers worked out by hand."""

import random
from typing import Any

import pytest
import torch

from megatron_rmt.algorithm.rewards import (
    REWARDS,
    Evidence,
    information_gain,
    is_right,
    leading_tokens,
    length_reward,
    match,
    matches,
    needs_answer,
    total_reward,
)
from megatron_rmt.prompt.response import Response

TRIANGLE = [(0, 0.0), (40, 0.25), (160, 1.0), (200, 0.75), (240, 0.5), (320, 0.0), (1000, 0.0)]


@pytest.mark.parametrize(("length", "reward"), TRIANGLE)
def test_length_reward_is_a_triangle_around_the_budget(length, reward):
    assert length_reward(torch.tensor(length), 160).item() == reward
    assert length_reward(torch.tensor(float(length)), 160, maximum=2.0).item() == 2 * reward


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_length_reward_of_a_tensor_is_that_of_each_of_its_numbers(dtype):
    lengths, expected = zip(*TRIANGLE, strict=True)
    rewards = length_reward(torch.tensor(lengths, dtype=dtype), 160, maximum=0.5)
    assert rewards.is_floating_point()
    assert rewards.tolist() == [reward / 2 for reward in expected]


def test_length_reward_keeps_the_shape_at_every_budget():
    lengths = torch.tensor([[1], [2]])
    rewards = [length_reward(lengths, budget).tolist() for budget in (1, 2, 4)]
    assert rewards == [[[1.0], [0.0]], [[0.5], [1.0]], [[0.25], [0.5]]]


@pytest.mark.parametrize("boxed", [False, True])
@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (b"th", True),
        (b"the", True),
        (b"the cat", True),
        (b"the \xc3\xa9", False),
        (b"t", False),  # not where a token ends
        (b"the c", False),  # a prefix that ends inside a token
        (b"tx", False),  # as long as a token
        (b"the cat sat", False),  # longer than what is known
        (b"", False),
    ],
)
def test_a_match_is_a_prefix_that_ends_where_a_token_ends(prediction, right, boxed):
    assert matches(prediction, [b"th", b"e", b" cat"], boxed=boxed) is right


def test_a_match_never_is_an_empty_prediction():
    # Tokens without bytes end at 0.
    for boxed in (False, True):
        assert not matches(b"", [b"", b"the"], boxed=boxed)
        assert not matches(b"", [], boxed=boxed)


def test_matches_compare_bytes_not_characters():
    # "é" as two tokens of one byte: half a character may be predicted.
    truth = [b"\xc3", b"\xa9", b"t"]
    assert matches(b"\xc3", truth, boxed=False)
    assert matches(b"\xc3\xa9", truth, boxed=False)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (b" the", True),
        (b" the cat", True),
        (b"the", True),
        (b"the cat", True),
        (b" the \n", True),
        (b"the ", True),
        (b"th", False),
        (b"cat", False),
        (b"", False),
        (b" ", False),
    ],
)
def test_a_match_in_a_box_forgives_white_space_at_the_ends(prediction, right):
    assert matches(prediction, [b" the", b" cat"], boxed=True) is right


def test_a_match_without_a_box_is_exact():
    truth = [b" the", b" cat"]
    assert matches(b" the", truth, boxed=False)
    assert not matches(b"the", truth, boxed=False)
    assert not matches(b" the ", truth, boxed=False)
    assert not matches(b"the ", [b"the", b" cat"], boxed=False)


def test_a_token_of_white_space_cannot_be_skipped():
    # The next token is the line break.
    truth = [b"\n\n", b"The"]
    assert not matches(b"The", truth, boxed=True)
    assert matches(b"\n\n", truth, boxed=True)
    assert matches(b"\n\nThe", truth, boxed=True)
    assert not matches(b"x", [], boxed=True)


@pytest.mark.parametrize("boxed", [False, True])
def test_matches_are_the_predictions_that_name_one_or_more_tokens(boxed):
    """Against all predictions that are right, written out."""
    draw = random.Random(4)
    found = {False: 0, True: 0}
    for _ in range(3000):
        truth = [
            bytes(draw.choices(b"a ", k=draw.randint(0, 3))) for _ in range(draw.randint(0, 4))
        ]
        prediction = bytes(draw.choices(b"a ", k=draw.randint(0, 6)))
        starts = {b"".join(truth[:count]) for count in range(1, len(truth) + 1)}
        expected = prediction in starts - {b""}
        if boxed and truth and truth[0].strip():
            bare = [truth[0].lstrip(), *truth[1:]]
            starts = {b"".join(bare[:count]) for count in range(1, len(bare) + 1)}
            expected = expected or prediction.strip() in starts - {b""}
        assert matches(prediction, truth, boxed=boxed) is expected
        found[expected] += 1
    assert min(found.values()) > 100, found


def _evidence(**changes: Any) -> Evidence:
    """Two positions, a group of two: right; not well formed; in other letters; right with more."""
    responses = [
        [Response(2, True, True, b"the"), Response(3, True, False, b" the")],
        [Response(4, True, True, b"CAT"), Response(5, True, True, b" cat sat")],
    ]
    options = {
        "trunk": lambda index: b"",
        "truth": [[b" the", b" cat"], [b" cat", b" sat"]],
        "responses": responses,
        "thought_lengths": torch.tensor([[2.0, 3.0], [4.0, 5.0]]),
        "budget": torch.tensor([[4.0], [4.0]]),
        "boxed": True,
        "log_probs_of_truth": lambda: (torch.zeros(2), torch.zeros(2, 2)),
    }
    return Evidence(**options | changes)


def test_the_match_is_of_each_well_formed_response_at_its_own_position():
    assert REWARDS["match"] is match
    assert match(_evidence()).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert match(_evidence(boxed=False)).tolist() == [[0.0, 0.0], [0.0, 1.0]]
    none = _evidence(truth=[], responses=[], thought_lengths=torch.zeros(0, 2))
    assert match(none).shape == (0, 2)


@pytest.mark.parametrize(
    ("prediction", "boxed", "found"),
    [
        (b" the cat sat", False, 3),
        (b" the cat sat down", False, 3),
        (b" the cat ", False, 2),
        (b" the dog", False, 1),
        (b" th", False, 0),
        (b"", False, 0),
        (b"the cat", False, 0),
        (b"the cat", True, 2),
        (b"\n the cat", True, 2),
    ],
)
def test_of_several_tokens_those_count_that_a_prediction_begins_with(prediction, boxed, found):
    truth = [b" the", b" cat", b" sat"]
    assert leading_tokens(prediction, truth, boxed=boxed) == found
    responses = [[Response(1, True, True, prediction), Response(1, True, False, prediction)]]
    evidence = {"truth": [[*truth, b" down"]], "responses": responses, "boxed": boxed}
    evidence["thought_lengths"] = torch.ones(1, 2)
    earned = match(_evidence(**evidence, target_tokens=3))
    torch.testing.assert_close(earned, torch.tensor([[found / 3, 0.0]]))
    # At the end of a text there are fewer to be had.
    short = evidence | {"truth": [truth[:1]]}
    assert match(_evidence(**short, target_tokens=3)).tolist() == [[float(found > 0), 0.0]]


def test_a_response_that_is_not_well_formed_is_not_right():
    truth = [b"the"]
    assert is_right(Response(1, True, True, b"the"), truth, boxed=False)
    assert not is_right(Response(1, True, False, b"the"), truth, boxed=False)


def test_evidence_has_the_log_probs_of_the_truth_with_and_without_the_thought():
    without, after = torch.tensor([-1.0, -2.0]), torch.tensor([[-3.0, -4.0], [-5.0, -6.0]])
    evidence = _evidence(log_probs_of_truth=lambda: (without, after))
    assert evidence.log_prob_of_truth(after_thought=True).tolist() == after.tolist()
    assert evidence.log_prob_of_truth(after_thought=False).tolist() == [[-1.0], [-2.0]]


def test_the_information_gain_is_what_the_thought_adds_to_the_log_prob_of_the_truth():
    without, after = torch.tensor([-1.0, -2.0]), torch.tensor([[-3.0, -0.5], [-5.0, -2.0]])
    evidence = _evidence(log_probs_of_truth=lambda: (without, after))
    assert REWARDS["information-gain"](evidence).tolist() == [[-2.0, 0.5], [-3.0, 0.0]]
    assert evidence.reports == {"rmt information gain": (-4.5, 4.0)}


def test_only_a_reward_that_says_so_needs_no_answer():
    assert not needs_answer(information_gain)
    assert needs_answer(match)
    assert needs_answer(lambda of: of.thought_lengths)


def test_what_a_reward_reports_is_a_mean_under_its_name():
    evidence = _evidence()
    evidence.report("gain", torch.tensor([[0.5, 1.0], [1.5, 2.0]]))
    evidence.report("nothing", torch.empty(0, 2))
    assert evidence.reports == {"rmt gain": (5.0, 4.0), "rmt nothing": (0.0, 0.0)}
    assert _evidence().reports == {}


def test_total_reward_weighs_match_and_length():
    matched = torch.tensor([1.0, 0.0, 1.0, 0.0])
    length = torch.tensor([1.0, 1.0, 0.25, 0.0])
    total = total_reward(matched, length, 0.2)
    assert total.tolist() == pytest.approx([1.0, 0.2, 0.85, 0.0])
    assert torch.equal(total_reward(matched, length, 0.0), matched)
    assert torch.equal(total_reward(matched, length, 1.0), length)
