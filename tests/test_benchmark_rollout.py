"""``benchmark.py rollout`` on a tiny checkpoint: every case runs and the counts agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY
from tests.tiny_run import TinyInputs

pytestmark = pytest.mark.multiprocess


def test_all_cases_run_and_rows_are_counted(inputs: TinyInputs, tmp_path: Path):
    table, plot = tmp_path / "rollout.json", tmp_path / "occupancy.png"
    flags = "--document 64 --positions 4 --group 5 --tokens 12 --lengths spread --repeats 1"
    flags += " --at-once 2"
    corpus = inputs.checkpoint.parent / "corpus/train.jsonl"
    files = ["--checkpoint", inputs.checkpoint, "--data", corpus, "--json", table, "--plot", plot]
    command = [sys.executable, REPOSITORY / "tools/benchmark.py", "rollout", *flags.split(), *files]
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-2000:]
    report = json.loads(table.read_text())
    seconds, live, decoded = (report["data"][name] for name in ("seconds", "live", "decoded"))
    assert {"rollouts", "no shared trunk", "generate", "products", "even lengths"} <= set(seconds)
    assert all(time > 0 for times in seconds.values() for time in times)
    assert live[0] == 20
    # Rollouts end at different lengths, all rows that live are decoded, and few that do not.
    assert live == sorted(live, reverse=True)
    assert len(set(live)) > 3
    assert len(decoded) == len(live) - 1
    assert all(0 <= rows - alive <= 1 for rows, alive in zip(decoded, live[1:], strict=True))
    heads, width, layers, size = 2, 16, 4, 2
    tokens = 64 + 20 * (len_of_stem(report["title"]) + 12 + 1)
    assert report["data"]["key_value_bytes"] == 2 * heads * width * layers * size * tokens
    assert report["data"]["generate_key_value_bytes"] > report["data"]["key_value_bytes"]
    passes = report["data"]["passes"]
    assert 12 < passes["begin where others end"] <= passes["waves"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def len_of_stem(title: str) -> int:
    return int(title.partition("stem ")[2].partition(",")[0])
