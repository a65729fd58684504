"""Foreseen against allocated keys and values, and the waves that a bound makes."""

import pytest
import torch

from megatron_rmt.rollout.kv_cache import KeyValueStore, TailCache
from megatron_rmt.rollout.memory import (
    GIB,
    CacheSize,
    in_bytes,
    key_value_bytes,
    positions_at_once,
    rollout_waves,
)
from tests.tiny_model import build_model

pytestmark = pytest.mark.usefixtures("single_process_megatron")

# Two layers, two key heads of width 8, keys and values, in fp32.
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4


def _bytes(stored: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(x.numel() * x.element_size() for pair in stored.values() for x in pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_is_what_the_store_allocates(dtype):
    token_bytes = key_value_bytes(build_model(dtype))
    assert token_bytes == TOKEN_BYTES * dtype.itemsize // 4
    size = CacheSize(token_bytes, 11, rows=6, rows_per_position=3, tail_tokens=9)
    store, tails = KeyValueStore(11), TailCache(9)
    for layer in (1, 2):
        trunk = torch.zeros(11, 2, 8, dtype=dtype)
        store.write_trunk(layer, 0, trunk, trunk)
        stem = torch.zeros(2, 4, 2, 8, dtype=dtype)
        tails.start(layer, stem, stem, group=3)
    assert size.total_bytes == _bytes(store.trunk) + _bytes(tails.stored)


def test_gibibytes_in_bytes_and_no_bound_is_none():
    assert in_bytes(0.5) == 2**29
    assert in_bytes(1 / 3) == 357913941
    assert in_bytes(None) is None


def _waves(positions: int, kv_bytes: int | None, in_flight: int = 1) -> list[slice]:
    size = CacheSize(
        TOKEN_BYTES,
        trunk_tokens=100,
        rows=positions * 4,
        rows_per_position=4,
        tail_tokens=10,
        in_flight=in_flight,
    )
    return rollout_waves(positions, positions_at_once(size, kv_bytes), experts=None)


def _sizes(waves: list[slice], positions: int) -> list[int]:
    """After making sure that they are all positions in order."""
    assert [index for wave in waves for index in range(positions)[wave]] == [*range(positions)]
    return [wave.stop - wave.start for wave in waves]


def test_waves_are_as_few_as_fit_and_nearly_equal():
    trunk, position = 100 * TOKEN_BYTES, 40 * TOKEN_BYTES
    assert _sizes(_waves(7, None), 7) == [7]
    assert _sizes(_waves(7, trunk + 7 * position), 7) == [7]
    assert _sizes(_waves(7, trunk + 7 * position - 1), 7) == [3, 4]
    assert _sizes(_waves(7, trunk + 3 * position), 7) == [2, 2, 3]
    assert _sizes(_waves(7, trunk + position), 7) == [1] * 7
    assert _sizes(_waves(0, trunk + position), 0) == [0]


def test_pipeline_stages_each_get_a_batch():
    assert _sizes(_waves(7, None, in_flight=2), 7) == [3, 4]
    assert _sizes(_waves(1, None, in_flight=2), 1) == [1]
    assert _sizes(_waves(5, None, in_flight=4), 5) == [1, 2, 2]


def test_what_does_not_fit_is_refused_with_numbers_and_remedies():
    least = 140 * TOKEN_BYTES
    with pytest.raises(ValueError, match="--rmt-rollout-kv-gib is") as error:
        _waves(7, least - 1)
    message = str(error.value)
    assert f"take {least / GIB:.3g} GiB" in message
    assert "28 rollouts x 10 tokens" in message
    assert "trunk of 100 tokens" in message
    for remedy in ("--rmt-initial-budget", "--rmt-group-size", "--seq-length"):
        assert remedy in message
    # With nothing to roll out there is nothing to refuse.
    assert len(_waves(0, least - 1)) == 1
