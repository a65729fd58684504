"""``docs/change.md``: its diffs apply, and train; so does a function from outside the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY
from tests.tiny_run import RMT, TinyInputs

PAGE = (REPOSITORY / "docs/change.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
DOORS = {
    "reward": ["--rmt-reward", "surprising"],
    "selection": ["--rmt-select", "hardest"],
    "loss": ["--rmt-loss", "clipped"],
}


def _train(checkout: Path, inputs: TinyInputs, flags: list[str], path: list[Path]) -> list[dict]:
    """The metrics of two steps of the checkout's own example."""
    metrics = path[0] / "metrics.jsonl"
    environment = {
        **os.environ,
        **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
        **{"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"},
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    words = [*inputs.flags(), *RMT, *flags, "--exit-interval", "2"]
    command = [sys.executable, str(checkout / "examples/pretrain_rmt.py"), *words]
    command += ["--rmt-metrics-file", str(metrics)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(line) for line in metrics.read_text().splitlines()]


@pytest.mark.multiprocess
def test_the_diffs_of_the_page_apply_and_train(inputs: TinyInputs, tmp_path: Path):
    assert len(DIFFS) == len(DOORS)
    checkout = tmp_path / "checkout"
    for folder in ("megatron_rmt", "examples"):
        shutil.copytree(REPOSITORY / folder, checkout / folder)
    for diff in DIFFS:
        patch = ["patch", "-p1", "--fuzz=0", "--directory", str(checkout)]
        subprocess.run(patch, input=diff, text=True, check=True, capture_output=True)
    # All at once: each shows in what it alone changes.
    flags = [word for words in DOORS.values() for word in words]
    changed = _train(checkout, inputs, flags, [checkout])
    plain = _train(REPOSITORY, inputs, [], [tmp_path, REPOSITORY])
    for line, reference in zip(changed, plain, strict=True):
        assert line["surprise"] > 0
        assert "surprise" not in reference
        # The hardest positions are none of the others.
        assert line["entropy of chosen"] > reference["entropy of chosen"]
        # On policy the ratio is 1 up to rounding, and so is its clip.
        assert abs(line["rl loss"]) < 1e-4


@pytest.mark.multiprocess
def test_a_function_from_outside_is_trained_with(inputs: TinyInputs, tmp_path: Path):
    ((module, source),) = PYTHON
    (tmp_path / f"{module}.py").write_text(source)
    name = re.search(r"^def (\w+)", source, re.MULTILINE)[1]
    flags = ["--rmt-reward", f"{module}:{name}", "--rmt-no-length-reward"]
    line = _train(REPOSITORY, inputs, flags, [tmp_path, REPOSITORY])[0]
    # Of a right answer less than 1 and of a wrong one nothing.
    assert 0 < line["reward"] < line["match rate"]


def test_a_diff_needs_few_lines():
    for diff in DIFFS:
        added = [line for line in diff.splitlines() if re.match(r"\+(?!\+)", line)]
        assert len(added) <= 15
        assert diff.count("+++ ") == 1, "one file"
