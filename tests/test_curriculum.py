"""Tiers, their probabilities over training, and the drawing of positions."""

import math
from collections import Counter

import pytest
import torch

from megatron_rmt.algorithm.curriculum import (
    EASY,
    HARD,
    MEDIUM,
    Candidates,
    choose_by_tier,
    draw_by_tier,
    first_that_differ,
    tier_probabilities,
    tiers,
)
from megatron_rmt.algorithm.rng import CURRICULUM_STREAM, uniforms
from megatron_rmt.algorithm.settings import Settings

THRESHOLDS = Settings().entropy_thresholds
START = (0.6, 0.3, 0.1)
END = (0.1, 0.3, 0.6)
KEY = {"seed": 5, "iteration": 3, "sample": 11}


def no_text(position):
    raise AssertionError("the text is made for those who ask")


def choose(tier_of_position, probabilities, count, **key):
    """Positions of a sample whose positions have these tiers."""
    return choose_by_tier(
        Candidates(
            entropies=torch.zeros(len(tier_of_position)),
            tiers=tier_of_position,
            probabilities=probabilities,
            count=count,
            progress=0.0,
            trunk=no_text,
            **(KEY | key),
        )
    )


def choose_many(tier_of_position, probabilities, count, draws=4000):
    """Positions of many samples with the same tiers: a list of lists."""
    return [
        choose(tier_of_position, probabilities, count, seed=1, iteration=2, sample=sample)
        for sample in range(draws)
    ]


def assert_frequency(count, draws, probability):
    assert abs(count / draws - probability) < 4 * math.sqrt(probability * (1 - probability) / draws)


def test_constants_are_the_papers():
    assert (EASY, MEDIUM, HARD) == (0, 1, 2)
    assert THRESHOLDS == (0.5, 1.0, 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tiers_are_closed_below_and_open_above(dtype):
    entropies = torch.tensor([0.0, 0.498, 0.5, 0.99, 1.0, 1.49, 1.5, 9.0], dtype=dtype)
    assert tiers(entropies, THRESHOLDS).tolist() == [-1, -1, 0, 0, 1, 1, 2, 2]
    assert tiers(entropies, THRESHOLDS).dtype == torch.int64


def test_nan_is_in_no_tier():
    assert tiers(torch.tensor([float("nan"), float("inf")]), THRESHOLDS).tolist() == [-1, 2]


def test_above_the_ceiling_is_no_tier():
    entropies = torch.tensor([0.6, 1.2, 1.7, 2.0, 2.0001, float("inf"), float("nan")])
    assert tiers(entropies, THRESHOLDS, ceiling=2.0).tolist() == [0, 1, 2, 2, -1, -1, -1]


def test_tiers_by_other_thresholds():
    assert tiers(torch.tensor([0.05, 0.15, 0.25, 0.35]), (0.1, 0.2, 0.3)).tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, START),
        (299, START),
        (300, START),
        (400, (0.475, 0.3, 0.225)),  # a quarter of the way from 0.3 to 0.7
        (500, (0.35, 0.3, 0.35)),
        (600, (0.225, 0.3, 0.475)),
        (700, END),
        (701, END),
        (1000, END),
    ],
)
def test_tier_probabilities_by_hand(iteration, expected):
    probabilities = tier_probabilities(iteration, 1000, 0.3, 0.7, START, END)
    assert probabilities == pytest.approx(expected, abs=1e-12)
    assert sum(probabilities) == pytest.approx(1.0)


def test_equal_ends_make_a_step():
    values = [tier_probabilities(t, 10, 0.3, 0.3, START, END) for t in range(11)]
    assert values == [START] * 3 + [END] * 8
    assert tier_probabilities(0, 10, 0.0, 0.0, START, END) == END
    assert tier_probabilities(9, 10, 1.0, 1.0, START, END) == START


def test_positions_are_ascending_distinct_and_eligible():
    tier_of_position = torch.tensor([-1, 0, 1, 2, -1, 0, 1, 2, 0, -1] * 5)
    for chosen in choose_many(tier_of_position, START, 12, draws=50):
        assert len(chosen) == 12
        assert chosen == sorted(set(chosen))
        assert all(tier_of_position[position] >= 0 for position in chosen)


@pytest.mark.parametrize("probabilities", [START, (1.0, 0.0, 0.0), None])
def test_all_eligible_positions_are_chosen_if_there_are_too_few(probabilities):
    tier_of_position = torch.tensor([-1, 2, 0, -1, 1, 0])
    chosen = choose(tier_of_position, probabilities, 100)
    assert chosen == [1, 2, 4, 5]
    assert all(type(position) is int for position in chosen)


@pytest.mark.parametrize("probabilities", [START, None])
def test_nothing_to_choose(probabilities):
    for tier_of_position, count in [
        (torch.tensor([-1, -1]), 3),
        (torch.empty(0, dtype=torch.int64), 3),
        (torch.tensor([0, 1]), 0),
    ]:
        assert choose(tier_of_position, probabilities, count) == []


def test_one_draw_takes_tiers_by_their_probability_and_positions_uniformly():
    # 2 easy, 5 medium and 1 hard position
    tier_of_position = torch.tensor([1, 0, 1, 2, 1, -1, 1, 0, 1])
    counts = Counter(p for (p,) in choose_many(tier_of_position, START, 1))
    for position, tier in enumerate(tier_of_position.tolist()):
        if tier < 0:
            assert counts[position] == 0
        else:
            assert_frequency(counts[position], 4000, START[tier] / (2, 5, 1)[tier])


def test_without_curriculum_every_eligible_position_is_equally_probable():
    tier_of_position = torch.tensor([1, 0, 1, 2, 1, -1, 1, 0, 1])
    counts = Counter(p for (p,) in choose_many(tier_of_position, None, 1))
    assert counts[5] == 0
    for position in {*range(9)} - {5}:
        assert_frequency(counts[position], 4000, 1 / 8)


def test_an_empty_tier_hands_its_mass_to_the_others_in_proportion():
    counts = Counter(p for (p,) in choose_many(torch.tensor([1, 2]), START, 1))
    assert_frequency(counts[0], 4000, 0.3 / 0.4)


def test_mass_on_empty_tiers_only_is_shared_equally():
    # 3 medium positions and 1 hard one: half of the draws each
    counts = Counter(p for (p,) in choose_many(torch.tensor([1, 1, 2, 1]), (1.0, 0.0, 0.0), 1))
    assert_frequency(counts[2], 4000, 1 / 2)
    assert_frequency(counts[0], 4000, 1 / 6)


def test_a_tier_that_runs_empty_hands_its_mass_on():
    # The easy position goes first or second; the pair of hard ones is left in proportion.
    # P(both hard) = 0.1/0.7 * (0.1/0.7); P(easy and a hard one) = 1 - that.
    counts = Counter(map(tuple, choose_many(torch.tensor([2, 0, 2]), (0.6, 0.3, 0.1), 2)))
    assert_frequency(counts[0, 2], 4000, (0.1 / 0.7) ** 2)
    assert_frequency(counts[0, 1], 4000, (1 - (0.1 / 0.7) ** 2) / 2)


def test_a_tier_of_probability_zero_is_the_last_resort():
    tier_of_position = torch.tensor([0, 2, 0, 2])
    assert {tuple(c) for c in choose_many(tier_of_position, (1.0, 0.0, 0.0), 2, 200)} == {(0, 2)}
    assert {c[0] for c in choose_many(tier_of_position, (0.0, 1.0, 0.0), 1, 200)} == {0, 1, 2, 3}


def test_choice_is_a_pure_function_of_the_key():
    tier_of_position = torch.arange(300) % 4 - 1

    def chosen(**key):
        return tuple(choose(tier_of_position, START, 20, **key))

    torch.manual_seed(0)
    first = chosen()
    torch.manual_seed(1)
    assert chosen() == first
    assert len({first, chosen(seed=6), chosen(iteration=4), chosen(sample=12)}) == 4


def test_choices_are_pinned():
    # A change of these positions changes every run that is resumed.
    tier_of_position = torch.arange(300) % 4 - 1
    assert choose(tier_of_position, START, 8) == [13, 17, 30, 69, 101, 106, 129, 205]
    assert choose(tier_of_position, None, 8) == [14, 15, 30, 73, 101, 106, 129, 206]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_choice_does_not_depend_on_the_device():
    tier_of_position = torch.arange(300) % 4 - 1
    chosen = choose(tier_of_position, START, 20)
    assert choose(tier_of_position.cuda(), START, 20) == chosen


def test_the_first_draws_do_not_depend_on_how_many_there_are():
    tier_of_position = torch.arange(60) % 4 - 1
    entropies = torch.zeros(60)
    draws = [
        draw_by_tier(
            Candidates(entropies, tier_of_position, START, count, 0.0, **KEY, trunk=no_text)
        )
        for count in (5, 12, 99)
    ]
    assert draws[0] == draws[1][:5]
    assert draws[1] == draws[2][:12]
    assert sorted(draws[0]) == choose(tier_of_position, START, 5)
    assert draws[2] != sorted(draws[2])


@pytest.mark.parametrize(
    ("differ", "count", "kept"),
    [
        ([True, True, True, True], 2, [0, 1]),
        ([False, True, False, True, True], 2, [1, 3]),
        ([False, True, False, False], 2, [0, 1]),
        ([False, False, False], 2, [0, 1]),
        ([False, True, False, False, True], 4, [0, 1, 2, 4]),
        ([False, True], 3, [0, 1]),
        ([], 3, []),
    ],
)
def test_the_first_that_differ_are_kept_and_filled_up_with_the_first_of_the_rest(
    differ, count, kept
):
    assert first_that_differ(differ, count) == kept


def test_candidates_draw_pairs_of_the_curriculums_own_stream():
    candidates = Candidates(
        torch.zeros(1), torch.zeros(1).long(), None, 1, 0.0, **KEY, trunk=no_text
    )
    expected = [
        [uniforms(5, 3, 11, 0, which, draw, stream=CURRICULUM_STREAM).item() for which in (0, 1)]
        for draw in range(3)
    ]
    assert candidates.draws(3) == expected
    assert candidates.draws(0) == []
