"""Group-relative advantages."""

import statistics

import pytest
import torch

from megatron_rmt.algorithm.advantages import group_advantages


def test_advantages_by_hand():
    # mean 0.5, deviations -0.5, 0.5; population std 0.5
    # mean 0.25, deviations -0.25 (three times), 0.75; variance 0.1875; std sqrt(3) / 4
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    root = 3**0.5
    expected = [-1.0, 1.0, 1.0, -1.0, -1 / root, -1 / root, -1 / root, root]
    assert group_advantages(rewards).flatten().tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_equal_the_reference_and_have_mean_0_and_mean_square_1(dtype):
    rewards = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    rewards[7] *= 1e-4  # scale does not matter: nothing is added to the denominator
    advantages = group_advantages(rewards)
    assert advantages.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for group, result in zip(rewards.double().tolist(), advantages.tolist(), strict=True):
        mean, deviation = statistics.fmean(group), statistics.pstdev(group)
        assert result == pytest.approx([(r - mean) / deviation for r in group], abs=tolerance)
    assert advantages.mean(1).abs().max() < tolerance
    assert (advantages.square().mean(1) - 1).abs().max() < tolerance


def test_a_single_differing_reward_in_a_group_of_eight():
    # r = (1, 0 x 7): mean 1/8, std sqrt(7)/8, so sqrt(7) and -1/sqrt(7)
    advantages = group_advantages(torch.tensor([[1.0] + [0.0] * 7], dtype=torch.float64))[0]
    assert advantages[0].item() == pytest.approx(7**0.5)
    assert advantages[1].item() == pytest.approx(-(7**-0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.2, 0.85, -3.0])
def test_equal_rewards_give_zeros(value, dtype):
    assert not group_advantages(torch.full((2, 8), value, dtype=dtype)).any()


def test_rewards_that_differ_by_rounding_only_give_zeros():
    # The same reward computed in two ways is one unit in the last place off.
    noise = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.3]], dtype=torch.float64)
    assert noise.std() > 0
    assert not group_advantages(noise).any()
    single = torch.full((1, 8), 0.85)
    single[0, 3] = torch.nextafter(single[0, 3], torch.tensor(1.0))
    assert not group_advantages(single).any()


def test_small_true_differences_are_kept():
    # One token more in a thought of 10^4: far above rounding.
    rewards = torch.full((1, 8), 0.2)
    rewards[0, 0] += 2e-5
    assert group_advantages(rewards)[0, 0].item() == pytest.approx(7**0.5, rel=1e-5)


def test_flat_groups_do_not_touch_the_others():
    rewards = torch.tensor([[0.2, 0.2], [0.0, 1.0]])
    assert group_advantages(rewards).tolist() == [[0.0, 0.0], [-1.0, 1.0]]


def test_a_group_of_one_gives_zero():
    assert group_advantages(torch.tensor([[0.7], [0.0]])).tolist() == [[0.0], [0.0]]


def test_no_positions_give_no_advantages():
    assert group_advantages(torch.empty(0, 8)).shape == (0, 8)


def test_without_the_deviation_small_differences_stay_small():
    rewards = torch.tensor([[1.0, 0.0], [0.001, 0.0], [0.5, 0.5]], dtype=torch.float64)
    found = group_advantages(rewards, standardise=False)
    expected = torch.tensor([[0.5, -0.5], [0.0005, -0.0005], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
