"""Rewards, against numbers worked out by hand."""

import pytest
import torch

from megatron_rmt.algorithm.rewards import length_reward, prefix_match_reward, total_reward

TRIANGLE = [(0, 0.0), (40, 0.25), (160, 1.0), (200, 0.75), (240, 0.5), (320, 0.0), (1000, 0.0)]


@pytest.mark.parametrize(("length", "reward"), TRIANGLE)
def test_length_reward_is_a_triangle_around_the_budget(length, reward):
    assert length_reward(length, 160) == reward
    assert length_reward(float(length), 160.0, maximum=2.0) == 2 * reward


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_length_reward_of_a_tensor_equals_that_of_its_numbers(dtype):
    lengths, expected = zip(*TRIANGLE, strict=True)
    rewards = length_reward(torch.tensor(lengths, dtype=dtype), 160, maximum=0.5)
    assert rewards.is_floating_point()
    assert rewards.tolist() == [reward / 2 for reward in expected]


def test_length_reward_broadcasts_over_budgets():
    rewards = length_reward(torch.tensor([[1], [2]]), torch.tensor([1, 2, 4]))
    assert rewards.tolist() == [[1.0, 0.5, 0.25], [0.0, 1.0, 0.5]]


def test_length_reward_refuses_bad_numbers():
    with pytest.raises(ValueError, match="budget is 0"):
        length_reward(1, 0)
    with pytest.raises(ValueError, match="length is -1"):
        length_reward(-1, 5)


@pytest.mark.parametrize(
    ("prediction", "reward"),
    [
        (b"th", 1.0),
        (b"the", 1.0),
        (b"the cat", 1.0),
        (b"the \xc3\xa9", 0.0),
        (b"t", 0.0),  # not a boundary
        (b"the ", 0.0),  # a prefix that ends inside a token
        (b"tx", 0.0),  # as long as a token
        (b"the cat sat", 0.0),  # longer than what is known
        (b"", 0.0),
    ],
)
def test_prefix_match_needs_a_prefix_that_ends_on_a_boundary(prediction, reward):
    assert prefix_match_reward(prediction, b"the cat", (2, 3, 7)) == reward


def test_prefix_match_never_accepts_an_empty_prediction():
    # Tokens without bytes put a boundary at 0.
    assert prefix_match_reward(b"", b"the", (0, 3)) == 0.0


def test_prefix_match_compares_bytes_not_characters():
    # "é" as two tokens of one byte: half a character may be predicted.
    assert prefix_match_reward(b"\xc3", b"\xc3\xa9t", (1, 2, 3)) == 1.0
    assert prefix_match_reward(b"\xc3\xa9", b"\xc3\xa9t", (1, 2, 3)) == 1.0


def test_total_reward_weighs_match_and_length():
    match = torch.tensor([1.0, 0.0, 1.0, 0.0])
    length = torch.tensor([1.0, 1.0, 0.25, 0.0])
    total = total_reward(match, length, 0.2)
    assert total.tolist() == pytest.approx([1.0, 0.2, 0.85, 0.0])
    assert torch.equal(total_reward(match, length, 0.0), match)
    assert torch.equal(total_reward(match, length, 1.0), length)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_total_reward_refuses_a_weight_outside_0_1(weight):
    with pytest.raises(ValueError, match="weight is"):
        total_reward(torch.ones(1), torch.ones(1), weight)
