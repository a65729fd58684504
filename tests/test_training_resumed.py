"""Whole runs that are stopped and go on."""

from pathlib import Path

import pytest
import torch

from tests.tiny_run import RMT, STEPS, Run, checkpoint_tensors
from tests.training_curves import CP2, PP2_VP2, TP2, Start, assert_same_curve

pytestmark = pytest.mark.multiprocess


@pytest.mark.slow
@pytest.mark.parametrize("layout", [PP2_VP2, CP2], ids=["PP2 x VP2", "CP2"])
@pytest.mark.parametrize(
    "options", [[], ["--rmt-reward", "information-gain", "--rmt-baseline-decay", "0.5"]]
)
def test_a_run_resumes_bitwise_in_its_layout_and_in_one_process(
    start: Start, tmp_path: Path, options: list[str], layout: list[str]
):
    flags, first, second = [*RMT, *options], tmp_path / "first", tmp_path / "second"
    saving = ["--save-interval", "2", "--exit-interval", "4", "--save"]
    whole = start(2, [*flags, *layout, *saving, str(first)])
    (first / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = start(2, [*flags, *layout, *saving, str(second)], resume_from=first)
    assert resumed.metrics == whole.metrics[2:]
    ours, expected = (checkpoint_tensors(folder, 4) for folder in (second, first))
    assert ours.keys() == expected.keys()
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in ours)
    assert any(name.startswith("rmt_baseline.decoder") for name in ours) == bool(options)
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    alone = start(1, [*flags, "--exit-interval", "4"], resume_from=first)
    for line, expected_line in zip(alone.metrics, whole.metrics[2:], strict=True):
        assert line["rollout checksum"] == expected_line["rollout checksum"]
        for name in ("reward", "grad norm", "ntp loss"):
            assert line[name] == pytest.approx(expected_line[name], rel=1e-3, abs=1e-5), name


@pytest.mark.faults
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    start: Start, reference: Run, saved: Path, stopped: tuple[Path, Run], tmp_path: Path
):
    directory, first_half = stopped
    assert first_half.metrics == reference.metrics[:3]
    flags = ["--save", str(tmp_path / "second"), "--save-interval", str(STEPS)]
    second_half = start(1, [*RMT, *flags], resume_from=directory)
    assert second_half.metrics == reference.metrics[3:]

    ours = checkpoint_tensors(tmp_path / "second", STEPS)
    expected = checkpoint_tensors(saved, STEPS)
    assert ours.keys() == expected.keys()
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in ours)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    before = checkpoint_tensors(directory, 3)
    weight = "decoder.layers.mlp.linear_fc1.weight"
    assert not torch.equal(before[weight], expected[weight])


def test_a_run_resumed_in_another_layout_goes_on_alike(
    start: Start, reference: Run, stopped: tuple[Path, Run]
):
    second_half = start(2, [*RMT, *TP2], resume_from=stopped[0])
    assert_same_curve(second_half.metrics, reference.metrics[3:])


BASELINE = [*RMT, "--rmt-reward", "information-gain", "--rmt-baseline-decay", "0.5"]


def test_a_run_with_a_moving_average_resumes_bitwise_in_its_layout(start: Start, tmp_path: Path):
    """Also the first step, whose average is the policy, against a run without one."""
    plain = start(1, [*BASELINE[:-2], "--exit-interval", "1"]).metrics
    saving = ["--save", str(tmp_path / "first"), "--save-interval", "2", "--exit-interval", "4"]
    whole = start(1, [*BASELINE, *saving])
    gains = [lines[0]["information gain"] for lines in (whole.metrics, plain)]
    assert gains[0] == pytest.approx(gains[1], rel=1e-6)
    (tmp_path / "first/latest_checkpointed_iteration.txt").write_text("2")
    resuming = ["--exit-interval", "4", "--save", str(tmp_path / "second"), "--save-interval", "4"]
    resumed = start(1, [*BASELINE, *resuming], resume_from=tmp_path / "first")
    assert resumed.metrics == whole.metrics[2:]
    ours, expected = (checkpoint_tensors(tmp_path / run, 4) for run in ("second", "first"))
    averages = [name for name in expected if name.startswith("rmt_baseline.")]
    assert (
        len(averages) == len([name for name in expected if name.startswith("decoder.layers")]) + 2
    )
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    # Another layout goes on from the same average.
    other = start(2, [*BASELINE, *TP2, *resuming[:2]], resume_from=tmp_path / "first")
    for line, reference_line in zip(other.metrics, whole.metrics[2:], strict=True):
        assert line["rollout checksum"] == reference_line["rollout checksum"]
        for name in ("information gain", "reward", "grad norm"):
            assert line[name] == pytest.approx(reference_line[name], rel=1e-3, abs=1e-5), name
