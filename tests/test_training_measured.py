"""Whole runs that measure: held-out documents, and samples of Megatron's evaluations."""

import re
from pathlib import Path

import pytest

from tests.tiny_run import RMT, STEPS, Line, Run, TinyInputs
from tests.training_curves import (
    CP2,
    OVERLAP,
    PP2,
    PP2_VP2,
    SHARDED_OPTIMIZER,
    TP2,
    Start,
    assert_same_curve,
)

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="session")
def measuring(inputs: TinyInputs) -> list[str]:
    """Flags with which a run measures held-out documents before it and after every third step."""
    data = inputs.data.parents[1] / "corpus/train.jsonl"
    return ["--rmt-eval-interval", "3", "--rmt-eval-data", str(data), "--rmt-eval-documents", "5"]


@pytest.fixture(scope="session")
def measured(start: Start, measuring: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    save = tmp_path_factory.mktemp("measured")
    return start(1, [*RMT, *measuring, "--tensorboard-dir", str(save)])


def test_measuring_held_out_documents_changes_no_digit_of_a_run(measured: Run, reference: Run):
    lines = [
        {name: value for name, value in line.items() if not name.startswith("held-out")}
        for line in measured.metrics
    ]
    assert lines == [{"iteration": 0}, *reference.metrics]
    probed = [line["iteration"] for line in measured.metrics if "held-out thought" in line]
    assert probed == [0, 3, 6]
    assert all(measured.metrics[at]["held-out positions"] == 20 for at in probed)
    assert all(0 < measured.metrics[at]["held-out next token"] < 1 for at in probed)


def test_a_resumed_run_is_measured_where_the_uninterrupted_one_is_and_alike(
    start: Start, measuring: list[str], measured: Run, stopped: tuple[Path, Run]
):
    """It was stopped after step 3, whose measurement is not taken again."""
    resumed = start(1, [*RMT, *measuring], resume_from=stopped[0])
    assert [line["iteration"] for line in resumed.metrics] == [4, 5, 6]
    assert "held-out gain" in resumed.metrics[-1]
    assert resumed.metrics == measured.metrics[4:]


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        pytest.param(TP2, 2),
        pytest.param(PP2, 2, marks=pytest.mark.slow),
        pytest.param(PP2_VP2, 2, marks=pytest.mark.slow),
        pytest.param([*SHARDED_OPTIMIZER, *OVERLAP], 2, marks=pytest.mark.slow),
        pytest.param(CP2, 2, marks=pytest.mark.slow),
    ],
    ids=["tensor", "pipeline", "virtual", "data", "context"],
)
def test_held_out_documents_are_measured_alike_in_every_layout(
    start: Start, measuring: list[str], measured: Run, flags: list[str], ranks: int
):
    found = start(ranks, [*RMT, *measuring, *flags]).metrics
    assert_same_curve(found[1:], measured.metrics[1:])
    for line, expected in zip(found, measured.metrics, strict=True):
        for name in (name for name in expected if name.startswith("held-out")):
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


EVALUATED = ["--eval-iters", "2", "--eval-interval", "3", "--split", "80,10,10"]
THOUGHTS = ["--rmt-eval-samples", "5"]


@pytest.fixture(scope="session")
def evaluated(start: Start) -> Run:
    return start(1, [*RMT, *EVALUATED, *THOUGHTS])


def _of_evaluations(found: Run) -> list[Line]:
    return [
        {name: value for name, value in line.items() if name.startswith(("validation", "test"))}
        for line in found.metrics
    ]


def _losses(found: Run) -> list[str]:
    return re.findall(r" (?:validation|test) loss at .*", found.log)


@pytest.mark.slow
def test_thoughts_on_samples_of_an_evaluation_change_no_digit_of_it_or_of_the_run(
    start: Start, evaluated: Run
):
    without = start(1, [*RMT, *EVALUATED])
    assert len(_losses(without)) == 4
    assert _losses(evaluated) == _losses(without)
    first_of_each = {line["iteration"]: line for line in reversed(evaluated.metrics)}
    trained = [first_of_each[step] for step in range(1, STEPS + 1)]
    assert trained == without.metrics
    # After the third step and the last, on the validation split; and on both at the end.
    measured = [own for own in _of_evaluations(evaluated) if own]
    assert [sorted({name.split()[0] for name in own}) for own in measured] == [
        *[["validation"]] * 3,
        ["test", "validation"],
    ]
    for own in measured:
        assert own["validation positions"] == 20
        for name in ("next token", "thought", "no thought"):
            assert 0 <= own[f"validation {name}"] <= 1
    assert any(0 < own["validation next token"] < 1 for own in measured)
    assert evaluated.log.count(" RMT at iteration ") == 4
    # An amended line holds all of its step's.
    last = [line for line in evaluated.metrics if line["iteration"] == STEPS][-1]
    assert trained[-1].items() <= last.items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, TP2), (2, PP2_VP2), (2, [*SHARDED_OPTIMIZER, *OVERLAP])],
    ids=["tensor", "virtual", "data"],
)
def test_an_evaluation_is_measured_alike_in_every_layout(
    start: Start, evaluated: Run, ranks: int, flags: list[str]
):
    found = start(ranks, [*RMT, *EVALUATED, *THOUGHTS, *flags])
    for own, expected in zip(_of_evaluations(found), _of_evaluations(evaluated), strict=True):
        assert own == pytest.approx(expected, rel=1e-4, abs=1e-6)
