"""SIGKILL at any moment costs at most the steps since the last checkpoint, and no digit."""

import re
from pathlib import Path

import pytest
import torch

from megatron_rmt.job.console import LOG
from tests.killed_run import PHASES, SAVE_INTERVAL, STEPS, Launcher, metrics_lines, run_killed
from tests.tiny_run import TinyInputs, checkpoint_tensors

pytestmark = pytest.mark.faults


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("ranks", "count"), [(1, 6), (2, 14)])
def test_a_run_that_is_killed_at_any_moment_ends_bit_for_bit_as_if_nothing_had_been(
    inputs: TinyInputs, tmp_path: Path, ranks: int, count: int
):
    quiet = Launcher(tmp_path / "quiet", inputs, ranks)
    killed = Launcher(tmp_path / "killed", inputs, ranks)
    assert quiet.live() == 0, (quiet.folder / "log").read_text()[-3000:]
    kills = run_killed(killed, seed=ranks, count=count)

    struck = [kill for kill in kills if kill.struck]
    assert len(struck) >= count - 2, kills
    assert {kill.phase for kill in struck} == set(PHASES)
    # Most lives resume, so that it is the resuming which is tested.
    log = (killed.saved / LOG).read_text(errors="replace")
    resumed = re.findall(r"successfully loaded checkpoint from .* at iteration ([1-9]\d*)", log)
    assert len(resumed) > count / 2, resumed
    assert killed.latest() == quiet.latest() == STEPS
    expected = metrics_lines(quiet)
    assert len(expected) == STEPS
    found = metrics_lines(killed)
    assert set(found) == set(expected)
    assert len(found) <= STEPS + SAVE_INTERVAL * (count + 1)
    ours, others = (checkpoint_tensors(own.saved, STEPS) for own in (killed, quiet))
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[name], others[name]) for name in ours)
