"""Which places rows take when others have left; the rest is tested with the whole of generation."""

import random

import pytest

from megatron_rmt.rollout.live_rollouts import places


@pytest.mark.parametrize("seed", range(50))
def test_samples_stay_together_and_no_order_keeps_more_rows_in_place(seed):
    draw = random.Random(seed)
    samples = [sample for sample in range(draw.randint(1, 5)) for _ in range(draw.randint(1, 9))]
    rows = [row for row in range(len(samples)) if draw.random() < draw.choice((0.2, 0.6, 0.95))]
    order = places(rows, samples)
    assert sorted(order) == rows
    # The samples in their order, each in one piece.
    assert [samples[row] for row in order] == [samples[row] for row in rows]
    could_stay = [row for row in rows if row < len(rows) and samples[row] == samples[order[row]]]
    assert [row for place, row in enumerate(order) if place == row] == could_stay


def test_one_row_that_ends_makes_one_move():
    assert places([0, 2, 3, 4], [7] * 5) == [0, 4, 2, 3]
    assert places([0, 1, 2], [7] * 5) == [0, 1, 2]
    assert places([], [7] * 5) == []
