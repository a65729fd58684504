"""Random numbers that are a pure function of their key.

There is no generator state. A uniform number is computed from (seed, iteration, sample, position,
rollout, token), so that every tensor- and pipeline-parallel rank draws alike, a resumed run repeats
itself exactly, and the draws do not depend on how the work is laid out over data-parallel ranks.
"""

import torch
from torch import Tensor

TOKEN_STREAM = 0
CURRICULUM_STREAM = 1

# SplitMix64 (Steele, Lea & Flood 2014): its increment and the two multipliers of its finaliser.
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 that has the low 64 bits of `value`."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words, in wrapping int64 arithmetic."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIER_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def uniforms(
    seed: int,
    iteration: int,
    sample: int | Tensor,
    position: int | Tensor,
    rollout: int | Tensor,
    token: int | Tensor,
    *,
    stream: int = TOKEN_STREAM,
) -> Tensor:
    """Counter-based uniform numbers in [0, 1), one for each key.

    The key's coordinates are folded one after the other into a 64-bit word, each by one SplitMix64
    step; only integer arithmetic is used, so that CPU and CUDA agree bit for bit.

    Args:
        seed, iteration: integers (taken modulo 2^64).
        sample, position, rollout, token: integers or integer tensors, broadcast together. Passing
            `token=torch.arange(n)` gives the numbers of n decoding steps at once.
        stream: keeps draws for different purposes apart (`TOKEN_STREAM`, `CURRICULUM_STREAM`).

    Returns:
        float64 of the broadcast shape (0-d for plain integers), with 53 random bits, on the
        tensors' device.
    """
    word = torch.zeros((), dtype=torch.int64)
    for coordinate in (seed, stream, iteration, sample, position, rollout, token):
        # A 0-d CPU tensor takes part in CUDA arithmetic as a scalar, without a copy.
        value = coordinate if isinstance(coordinate, Tensor) else torch.tensor(_signed(coordinate))
        word = _mix(word + (value.to(torch.int64) + 1) * _signed(_INCREMENT))
    return _shift_right(word, 11).to(torch.float64) * 2.0**-53
