"""The decay of the thinking budget, against numbers worked out by hand."""

from fractions import Fraction

from megatron_rmt.algorithm.budget import tier_budget, token_budget


def test_budget_decays_from_800_to_a_fifth():
    # 800 * 0.2^(1/4) = 534.99; 800 * 0.2^(1/2) = 357.77; 800 * 0.2^(3/4) = 239.26; 800 * 0.2 = 160
    values = [token_budget(iteration, 1000, 800, 1, 0.2) for iteration in (0, 250, 500, 750, 1000)]
    assert values == [800, 534, 357, 239, 160]


def test_whole_powers_are_not_lost_to_rounding():
    for initial in range(1, 2000):
        for decay in (0.1, 0.2, 0.5, 0.7):
            exact = initial * Fraction(str(decay))
            assert token_budget(1000, 1000, initial, 1, decay) == max(1, exact // 1)
    # 0.25^(1/2) = 0.5, 0.027^(1/3) = 0.3
    assert token_budget(1, 2, 10, 1, 0.25) == 5
    assert token_budget(1, 3, 10, 1, 0.027) == 3


def test_budget_does_not_fall_below_the_minimum():
    assert token_budget(100, 100, 800, 1, 1e-6) == 1
    assert token_budget(100, 100, 800, 200, 0.2) == 200
    assert token_budget(0, 100, 800, 200, 0.2) == 800


def test_budget_never_rises():
    values = [token_budget(iteration, 777, 800, 1, 0.2) for iteration in range(778)]
    assert values == sorted(values, reverse=True)


def test_an_exponent_above_1_lets_the_budget_fall_late():
    # 800 * 0.2^(1/4) at half of the run, which is where a quarter is without it.
    assert token_budget(500, 1000, 800, 1, 0.2, exponent=2.0) == 534
    assert token_budget(250, 1000, 800, 1, 0.2, exponent=0.5) == 357
    for exponent in (0.3, 1.0, 4.0):
        assert token_budget(0, 1000, 800, 1, 0.2, exponent) == 800
        assert token_budget(1000, 1000, 800, 1, 0.2, exponent) == 160


def test_decay_of_one_keeps_the_budget():
    assert {token_budget(iteration, 10, 37, 1, 1.0) for iteration in range(11)} == {37}


def test_a_tiers_budget_is_its_part_of_it_and_no_less_than_the_minimum():
    assert [tier_budget(7, part, 1) for part in (0.1, 0.5, 1.0, 2.0)] == [1, 3, 7, 14]
    assert tier_budget(7, 0.5, 5) == 5
    # 2.1 * 10 is one rounding error above 21, 1.1 * 10 and 0.7 * 10 one below or above theirs.
    for tenths in range(1, 40):
        assert tier_budget(10, tenths / 10, 1) == tenths
