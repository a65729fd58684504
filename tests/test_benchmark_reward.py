"""``benchmark.py reward`` on a tiny checkpoint: every way takes its step, and does what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY
from tests.tiny_run import TinyInputs

pytestmark = pytest.mark.multiprocess


def test_every_reward_and_selection_takes_its_step(inputs: TinyInputs, tmp_path: Path):
    table = tmp_path / "reward.json"
    flags = "--document 64 --positions 4 --group 4 --budget 6 --repeats 1 --dtype fp32"
    corpus = inputs.checkpoint.parent / "corpus/train.jsonl"
    files = ["--checkpoint", inputs.checkpoint, "--data", corpus, "--json", table]
    command = [sys.executable, REPOSITORY / "tools/benchmark.py", "reward", *flags.split(), *files]
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    report = json.loads(table.read_text())
    seconds = report["data"]["seconds"]
    assert len(seconds) == 6
    assert [row[0] for row in report["rows"]] == [*seconds]
    assert next(iter(seconds)) == "match"
    assert report["rows"][0][2:] == ["1.00", report["rows"][0][3], "1.00", "1.00"]
    for name, own in seconds.items():
        # A round behind one to warm up.
        assert {len(times) for times in own.values()} == {2}
        for parts in zip(*(own[part] for part in ("rollouts", "reward", "update")), strict=True):
            assert all(part > 0 for part in parts), name
        for part, step in zip(own["reward"], own["step"], strict=True):
            assert part < step
    # A pass of the model against a comparison of bytes.
    assert min(seconds["information gain"]["reward"]) > max(seconds["match"]["reward"])
