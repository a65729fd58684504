"""Counter-based random numbers."""

import math

import pytest
import torch
from torch import Tensor

from megatron_rmt.algorithm import rng
from megatron_rmt.algorithm.rng import CURRICULUM_STREAM, uniforms

COORDINATES = ("seed", "iteration", "sample", "position", "rollout", "token")


def reference_uniform(seed, iteration, sample, position, rollout, token, stream=0) -> float:
    """The same in Python's unbounded integers."""
    word = 0
    for coordinate in (seed, stream, iteration, sample, position, rollout, token):
        word = (word + (coordinate + 1) * 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        word = word ^ (word >> 31)
    return (word >> 11) / 2**53


def test_mixing_gives_the_published_splitmix64_sequence():
    # Output of the reference implementation (prng.di.unimi.it/splitmix64.c) for seed 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    state = torch.tensor([rng._signed(1234567 + (k + 1) * 0x9E3779B97F4A7C15) for k in range(5)])
    assert [word % 2**64 for word in rng._mix(state).tolist()] == published


def test_uniforms_equal_the_integer_reference():
    keys = torch.randint(-(2**62), 2**62, (50, 6), generator=torch.Generator().manual_seed(0))
    keys = [*keys.tolist(), [0] * 6, [-1] * 6, [1, 2, 3, 4, 5, 6], [2**63, 2**64 + 5, 7, 8, 9, 10]]
    for stream in (0, 1):
        for key in keys:
            assert uniforms(*key, stream=stream).item() == reference_uniform(*key, stream=stream)


def test_uniforms_are_pinned():
    # A change of these numbers changes every run that is resumed.
    assert uniforms(0, 0, 0, 0, 0, 0).item() == 0.038016437396753755
    assert uniforms(1234, 10, 7, 512, 3, 31).item() == 0.958667095048415
    assert uniforms(1234, 10, 7, 512, 3, 31, stream=1).item() == 0.0010980340085066098


def test_uniforms_broadcast_over_tensors_and_integers():
    position = torch.tensor([[3], [9]])
    rollout = torch.arange(4, dtype=torch.int32)
    numbers = uniforms(1, 2, 5, position, rollout, torch.tensor(6))
    assert numbers.shape == (2, 4)
    assert numbers.dtype == torch.float64
    for i, p in enumerate((3, 9)):
        for r in range(4):
            assert numbers[i, r].item() == reference_uniform(1, 2, 5, p, r, 6)


@pytest.mark.parametrize("coordinate", [*COORDINATES, "stream"])
def test_uniforms_along_each_coordinate_are_uniform_and_independent(coordinate):
    n = 2**11 if coordinate in ("seed", "iteration", "stream") else 2**17
    key = dict.fromkeys(COORDINATES, 3)
    if coordinate in ("seed", "iteration", "stream"):
        numbers = torch.stack([uniforms(**{**key, coordinate: i}) for i in range(n)])
    else:
        numbers = uniforms(**{**key, coordinate: torch.arange(n)})
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(numbers.unique()) == n
    assert_uniform(numbers)
    for lag in (1, 2, 8):
        assert_uncorrelated(numbers[:-lag], numbers[lag:])


def test_neighbours_in_two_coordinates_are_independent():
    grid = uniforms(
        0, 0, torch.arange(64)[:, None, None], torch.arange(64)[:, None], 0, torch.arange(64)
    )
    assert len(grid.unique()) == grid.numel()
    assert_uncorrelated(grid[:-1, :, 1:], grid[1:, :, :-1])
    assert_uncorrelated(grid[:, :-1, 1:], grid[:, 1:, :-1])
    assert_uncorrelated(grid[:-1, 1:], grid[1:, :-1])
    # Swapped coordinates are different keys.
    assert_uncorrelated(grid[:, :, 5], grid[:, :, 5].T.triu(1) + grid[:, :, 6].tril())


def test_streams_never_coincide():
    tokens = uniforms(7, 1, 2, 0, torch.arange(2)[:, None], torch.arange(1000))
    draws = uniforms(
        7, 1, 2, 0, torch.arange(2)[:, None], torch.arange(1000), stream=CURRICULUM_STREAM
    )
    assert not torch.isin(tokens, draws).any()
    assert_uncorrelated(tokens, draws)


def test_every_one_of_the_53_bits_is_fair():
    words = (uniforms(5, 0, 0, 0, 0, torch.arange(2**14)) * 2**53).long()
    for bit in range(53):
        ones = ((words >> bit) & 1).double().mean().item()
        assert abs(ones - 0.5) < 5 * 0.5 / 2**7


def assert_uniform(numbers: Tensor) -> None:
    n = len(numbers)
    distance = (numbers.sort().values - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov, p = 0.001


def assert_uncorrelated(x: Tensor, y: Tensor) -> None:
    correlation = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()
    assert abs(correlation) < 4.5 / math.sqrt(x.numel())
