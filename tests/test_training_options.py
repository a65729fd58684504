"""Whole runs with RMT's options, alike in every layout."""

from pathlib import Path

import pytest

from tests.tiny_run import RMT, Line, Run
from tests.training_curves import (
    CP2,
    PACKED,
    PP2,
    SHARDED_OPTIMIZER,
    TIERED,
    TP2,
    Start,
    assert_same_curve,
)

pytestmark = pytest.mark.multiprocess

SELECTED = (
    *("threshold easy", "threshold medium", "threshold hard", "above entropy ceiling"),
    *("replaced", "kept without variance"),
)


def test_without_budget_decay_and_length_reward(start: Start, reference: Run):
    """Ablations of the paper: a constant budget; match as the only reward."""
    flags = ["--rmt-no-budget-decay", "--rmt-no-length-reward", "--exit-interval", "3"]
    lines = start(1, [*RMT, *flags]).metrics
    assert [line["budget"] for line in lines] == [6, 6, 6]
    assert [line["reward"] for line in lines] == [line["match rate"] for line in lines]
    first = reference.metrics[0]
    assert lines[0]["rollout checksum"] == first["rollout checksum"]
    assert first["reward"] == pytest.approx(
        0.8 * first["match rate"] + 0.2 * first["length reward"]
    )


def test_without_curriculum_all_tiers_are_drawn_from(start: Start):
    hard_only = ["--rmt-start-probabilities", "0", "0", "1", "--exit-interval", "2"]
    curriculum = start(1, [*RMT, *hard_only]).metrics
    assert [line["chosen hard"] for line in curriculum] == [1, 1]
    uniform = start(1, [*RMT, *hard_only, "--rmt-no-curriculum"]).metrics
    assert sum(line["chosen easy"] + line["chosen medium"] for line in uniform) > 0


SELECTING = [
    *(*RMT, "--exit-interval", "3", "--rmt-entropy-ceiling", "3.3"),
    *("--rmt-threshold-quantiles", "0.2", "0.5", "0.6"),
    *("--rmt-select", "gain-variance", "--rmt-reserve-positions", "4"),
]


@pytest.fixture(scope="session")
def selecting(start: Start) -> list[Line]:
    return start(1, SELECTING).metrics


def test_a_selecting_run_follows_the_entropies_and_replaces_what_teaches_nothing(
    selecting: list[Line], reference: Run
):
    for line in selecting:
        ends = [line[f"threshold {tier}"] for tier in ("easy", "medium", "hard")]
        # Entropies are counted in bins of 0.01 nats, of which percentiles name the middle.
        assert line["entropy p10"] < ends[0] < ends[1] < ends[2] < line["entropy p90"]
        assert ends[1] == pytest.approx(line["entropy p50"] - 0.005)
        assert 0 < line["above entropy ceiling"] < 0.4
        assert ends[0] < line["entropy of chosen"] < 3.3
        # Where nothing matches no group differs, and none can take another's place.
        assert (line["kept without variance"] < 1) == (line["match rate"] > 0)
        assert line["match rate"] > 0 or line["replaced"] == 0
        # The reserve is rolled out and not trained.
        assert line["stem tokens"] == reference.metrics[line["iteration"] - 1]["stem tokens"]
    assert any(0 < line["replaced"] < 1 for line in selecting)
    assert len({line["threshold hard"] for line in selecting}) > 1


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, [*SHARDED_OPTIMIZER, *PACKED], id="DP2, packed"),
        pytest.param(2, TP2, id="TP2", marks=pytest.mark.slow),
        pytest.param(2, PP2, id="PP2", marks=pytest.mark.slow),
        pytest.param(2, CP2, id="CP2", marks=pytest.mark.slow),
    ],
)
def test_a_selecting_run_trains_alike_in_every_layout(
    start: Start, selecting: list[Line], ranks: int, flags: list[str]
):
    lines = start(ranks, [*SELECTING, *flags]).metrics
    assert_same_curve(lines, selecting)
    for line, expected in zip(lines, selecting, strict=True):
        for name in SELECTED:
            assert line[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.slow
def test_a_selecting_run_resumes_bitwise(start: Start, selecting: list[Line], tmp_path: Path):
    saving = ["--save", str(tmp_path), "--save-interval", "1"]
    start(1, [*SELECTING, *saving, "--exit-interval", "1"])
    resumed = start(1, [*SELECTING, "--exit-interval", "3"], resume_from=tmp_path)
    assert resumed.metrics == selecting[1:]


@pytest.fixture(scope="session")
def tiered(start: Start) -> list[Line]:
    return start(1, TIERED).metrics


def test_harder_positions_are_asked_for_longer_thoughts(tiered: list[Line], reference: Run):
    budgets = [(3, 6, 12), (2, 4, 8), (1, 3, 6)]
    for line, plain, asked in zip(tiered, reference.metrics, budgets, strict=False):
        shares = [line[f"chosen {tier}"] for tier in ("easy", "medium", "hard")]
        assert all(share < 1 for share in shares)
        mean = sum(share * own for share, own in zip(shares, asked, strict=True))
        assert line["budget"] == pytest.approx(mean, rel=1e-6)
        # What the rollouts drew under each stem is what the update sees under it.
        assert line["largest logprob difference"] < 1e-4
        assert line["trunk tokens"] == plain["trunk tokens"]
    # The weights, so the positions, are still those of the run without.
    assert [tiered[0][f"chosen {tier}"] for tier in ("easy", "medium", "hard")] == [
        reference.metrics[0][f"chosen {tier}"] for tier in ("easy", "medium", "hard")
    ]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, [*SHARDED_OPTIMIZER, *PACKED], id="DP2, packed"),
        pytest.param(4, [*TP2, *PP2], id="TP2 x PP2", marks=pytest.mark.slow),
        pytest.param(2, TP2, id="TP2", marks=pytest.mark.slow),
        pytest.param(2, PP2, id="PP2", marks=pytest.mark.slow),
    ],
)
def test_budgets_of_tiers_train_alike_in_every_layout(
    start: Start, tiered: list[Line], ranks: int, flags: list[str]
):
    assert_same_curve(start(ranks, [*TIERED, *flags]).metrics, tiered)


@pytest.mark.slow
def test_a_run_with_budgets_of_tiers_resumes_bitwise(
    start: Start, tiered: list[Line], tmp_path: Path
):
    saving = ["--save", str(tmp_path), "--save-interval", "1"]
    start(1, [*TIERED, *saving, "--exit-interval", "1"])
    assert start(1, TIERED, resume_from=tmp_path).metrics == tiered[1:]


def test_without_ntp_only_the_policy_loss_trains(start: Start, reference: Run):
    lines = start(1, [*RMT, "--rmt-no-ntp", "--exit-interval", "2"]).metrics
    first, first_hybrid = lines[0], reference.metrics[0]
    assert first["rollout checksum"] == first_hybrid["rollout checksum"]
    assert first["ntp loss"] == first_hybrid["ntp loss"], "still reported"
    assert 0 < first["grad norm"] != pytest.approx(first_hybrid["grad norm"], rel=1e-3)


def test_a_warm_up_with_the_texts_own_thoughts_trains_alike_in_every_layout(
    start: Start, reference: Run
):
    flags = [
        *RMT,
        "--rmt-warmup-iters",
        "2",
        "--rmt-warmup-thought",
        "text",
        "--exit-interval",
        "3",
    ]
    lines = start(1, flags).metrics
    first = reference.metrics[0]
    # As many responses as in other steps, each at a position of its own and asking for 6 tokens.
    assert lines[0]["stem tokens"] == first["stem tokens"] * 4
    assert lines[0]["rl loss"] == lines[1]["rl loss"] == 0
    assert "match rate" in lines[2]
    assert [line["warm-up loss"] > 0 for line in lines] == [True, True, False]
    for flags_of_layout, ranks in ((TP2 + PP2, 4), (PACKED, 2)):
        assert_same_curve(start(ranks, [*flags, *flags_of_layout]).metrics, lines)


@pytest.mark.parametrize("options", [[], ["--rmt-no-advantage-std"]])
def test_the_information_gain_trains_alike_in_every_layout(start: Start, options: list[str]):
    flags = [*RMT, "--rmt-reward", "information-gain", *options, "--exit-interval", "2"]
    alone = start(1, flags).metrics
    for line in alone:
        # No answer is drawn, and nothing is said of any.
        assert line["match rate"] is None
        assert line["well-formed rate"] == 1.0
        assert line["information gain"] != 0
        assert line["zero-variance groups"] < 1
    layouts = [(4, TP2 + PP2), (2, [*SHARDED_OPTIMIZER, *PACKED])]
    for ranks, layout in layouts[: 1 if options else None]:
        for line, expected in zip(start(ranks, [*flags, *layout]).metrics, alone, strict=True):
            assert line["rollout checksum"] == expected["rollout checksum"]
            for name in ("information gain", "reward", "grad norm", "ntp loss"):
                assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_segments_of_several_tokens_train_alike_in_every_layout(start: Start):
    flags = [*RMT, "--rmt-target-tokens", "3", "--rmt-answer-tokens", "4", "--rmt-warmup-iters"]
    flags += ["1", "--rmt-warmup-thought", "text", "--exit-interval", "3"]
    lines = start(1, flags).metrics
    # Shares of three tokens, some of them neither nothing nor all.
    assert all(0 < line["match rate"] < 1 for line in lines[1:])
    assert any(abs(3 * 48 * line["match rate"] % 3) > 0.5 for line in lines[1:])
    assert_same_curve(start(4, [*flags, *TP2, *PP2]).metrics, lines)
