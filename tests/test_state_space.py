"""The scan of state-space layers against their recurrence, one row after the other, in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_rmt.cpu import state_space
from megatron_rmt.cpu.hybrid_layers import GatedRMSNorm
from megatron_rmt.cpu.state_space import Lineage, State, StateSpace, mix, straight
from tests.tiny_model import rows_mixed_one_by_one

HEADS, GROUPS, HEAD_DIM, STATE_DIM, WIDTH = 6, 2, 3, 5, 4
CHANNELS = HEADS * HEAD_DIM + 2 * GROUPS * STATE_DIM
# A trunk of 9 rows that branches behind rows 3 and 8, one of those branches twice, a row without
# descendants, and a sequence of its own; -1 begins one.
PARENTS = [-1, 0, 1, 2, 3, 4, 5, 6, 7, 3, 9, 10, 11, 8, 13, 13, 15, 3, -1, 18, 19]


def _space(dtype: torch.dtype = torch.float64) -> StateSpace:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    return StateSpace(
        number=1,
        kernel=random(CHANNELS, WIDTH),
        bias=random(CHANNELS),
        dt_bias=random(HEADS),
        a_log=random(HEADS),
        skip=random(HEADS),
        groups=GROUPS,
        state_dim=STATE_DIM,
    )


def _rows(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    widths = (HEADS * HEAD_DIM, CHANNELS, HEADS)
    values = (torch.randn(count, n, generator=generator, dtype=torch.float64) for n in widths)
    return [own.to(dtype).requires_grad_() for own in values]


def _path(row: int) -> list[int]:
    return [*_path(PARENTS[row]), row] if row >= 0 else []


def _slow(space: StateSpace, rows: list[Tensor]) -> Tensor:
    """Each row as the last one of a sequence of its own."""
    paths = (torch.tensor(_path(row)) for row in range(len(PARENTS)))
    return torch.stack(
        [rows_mixed_one_by_one(space, *(own[path] for own in rows))[-1] for path in paths]
    )


def _weighed(mixed: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return (mixed * torch.randn(mixed.shape, generator=generator, dtype=mixed.dtype)).sum()


def _parameters(space: StateSpace) -> list[Tensor]:
    return [own for own in vars(space).values() if torch.is_tensor(own)]


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 64])
def test_a_tree_is_mixed_as_its_paths_with_the_same_gradients(chunk_rows, monkeypatch):
    monkeypatch.setattr(state_space, "CHUNK_ROWS", chunk_rows)
    space, rows = _space(), _rows(len(PARENTS))
    lineage = Lineage.of(torch.tensor(PARENTS), WIDTH)
    mixed, _ = mix(space, *rows, lineage, space.nothing_before())
    expected = _slow(space, rows)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    wanted = [*rows, *_parameters(space)]
    ours = torch.autograd.grad(_weighed(mixed), wanted)
    for own, slow in zip(ours, torch.autograd.grad(_weighed(expected), wanted), strict=True):
        assert slow.norm() > 0
        assert float((own - slow).norm() / slow.norm()) < 1e-12


@pytest.mark.parametrize("length", [1, 2, 5, 11])
def test_a_sequence_goes_on_from_the_state_that_its_first_part_leaves(length):
    space, rows = _space(), _rows(12)
    expected = rows_mixed_one_by_one(space, *rows)
    first, second = ([own[part] for own in rows] for part in (slice(length), slice(length, None)))
    lineage = Lineage.of(straight(1, length), WIDTH)
    begun, ends = mix(space, *first, lineage, space.nothing_before())
    end = ends.at(lineage.chunk_of(torch.tensor([length - 1])))
    # The second of two states that sequences begin with.
    start = State(*(torch.cat([torch.ones_like(own), own]) for own in end))
    parents = straight(1, 12 - length) - (torch.arange(12 - length) == 0).long()
    went_on, _ = mix(space, *second, Lineage.of(parents, WIDTH), start)
    torch.testing.assert_close(torch.cat([begun, went_on]), expected, rtol=1e-12, atol=1e-12)


def test_sequences_side_by_side_do_not_meet():
    space, rows = _space(), _rows(12)
    mixed, _ = mix(space, *rows, Lineage.of(straight(3, 4), WIDTH), space.nothing_before())
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        expected = rows_mixed_one_by_one(space, *(own[part] for own in rows))
        torch.testing.assert_close(mixed[part], expected, rtol=1e-12, atol=1e-12)


def test_half_precision_is_computed_in_fp32_and_steep_decays_stay_finite():
    space, rows = _space(torch.bfloat16), _rows(100, torch.bfloat16)
    space = dataclasses.replace(space, a_log=torch.full((HEADS,), 6.0, requires_grad=True))
    lineage = Lineage.of(straight(1, 100), WIDTH)
    mixed, ends = mix(space, *rows, lineage, space.nothing_before())
    assert mixed.dtype == torch.bfloat16
    assert ends.state.dtype == torch.float32
    for gradient in torch.autograd.grad(_weighed(mixed), [*rows, *_parameters(space)]):
        assert gradient.isfinite().all()


def test_no_rows_are_mixed_to_none():
    space = _space()
    mixed, ends = mix(space, *_rows(0), Lineage.of(straight(0, 1), WIDTH), space.nothing_before())
    assert mixed.shape == (0, HEADS * HEAD_DIM)
    assert ends.state.shape == (0, HEADS, HEAD_DIM, STATE_DIM)


def test_each_group_of_channels_has_a_norm_of_its_own():
    norm = GatedRMSNorm(6, 1e-5, 3, False, torch.device("cpu"), torch.float64)
    torch.nn.init.normal_(norm.weight)
    values = torch.randn(4, 2, 6, dtype=torch.float64)
    expected = torch.cat(
        [
            torch.nn.functional.rms_norm(values[..., part], (3,), norm.weight[part], 1e-5)
            for part in (slice(3), slice(3, 6))
        ],
        dim=-1,
    )
    torch.testing.assert_close(norm(values), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="gate first"):
        GatedRMSNorm(6, 1e-5, 3, True, torch.device("cpu"), torch.float64)
