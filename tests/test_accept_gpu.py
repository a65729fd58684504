"""The acceptance script: its checks hold on a CPU, what needs a GPU says so, failures count."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))

import accept_gpu
from acceptance import numbers
from acceptance.check import NEEDS_A_GPU, Check, Found, Machine

SCRIPT = REPOSITORY / "tools/accept_gpu.py"
CPU = Machine(torch.device("cpu"), gpus=0, folder=Path())


def _carried_out(check: Check) -> Found:
    return accept_gpu.carry_out(check, CPU, cpu_ranks=False)


@pytest.mark.parametrize(
    "check",
    [check for check in accept_gpu.CHECKS if not (check.gpus or check.runs)],
    ids=lambda check: check.name,
)
def test_what_has_a_form_for_a_cpu_holds_on_it(check: Check):
    found = _carried_out(check)
    assert found.passed is not False, found
    assert found.numbers or found.bound


@pytest.mark.parametrize(
    "check", [check for check in accept_gpu.CHECKS if check.gpus], ids=lambda check: check.name
)
def test_what_needs_a_gpu_says_so_and_states_no_number(check: Check):
    assert _carried_out(check) == Found(None, NEEDS_A_GPU)


def test_a_gpu_that_computes_something_else_fails(monkeypatch):
    exact = numbers.token_loss_sum

    def off(hidden: torch.Tensor, *others: object, **named: object) -> object:
        return exact(1.001 * hidden, *others, **named)

    monkeypatch.setattr(numbers, "token_loss_sum", off)
    by_name = {check.name: check for check in accept_gpu.CHECKS}
    assert _carried_out(by_name["head-fp32"]).passed is False
    monkeypatch.setattr(numbers, "uniforms", lambda *keys: torch.rand(8, dtype=torch.float64))
    assert _carried_out(by_name["random"]).passed is False


def test_a_bound_is_kept_by_every_number_and_nan_keeps_none():
    assert Found.below({"a": 1e-3, "b": 2e-3}, 1e-2).passed
    assert Found.below({"a": 1e-3, "b": 2e-3}, 1e-2).value == "0.002 (b)"
    assert Found.below({"a": 2e-2, "b": 0.0}, 1e-2).passed is False
    assert Found.below({"a": float("nan"), "b": 1.0}, 1e-2).value == "nan (a)"
    assert Found.below({"a": float("nan"), "b": 0.0}, 1e-2).passed is False


def test_a_failed_check_ends_with_one_and_the_others_are_carried_out(monkeypatch, tmp_path, capsys):
    def breaks(machine: Machine) -> Found:
        raise RuntimeError("an illegal memory access\nwas encountered")

    fine = Check("fine", "goes on", lambda machine: Found(True, "1", "1"))
    output = tmp_path / "acceptance.json"
    words = ["--cpu", "--output", str(output)]
    monkeypatch.setattr(accept_gpu, "CHECKS", (Check("broken", "breaks", breaks), fine))
    assert accept_gpu.main(words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["broken", "fine"]
    assert "FAILED  RuntimeError: an illegal memory access was encountered" in lines[0]
    assert json.loads(output.read_text())["fine"]["passed"] is True
    monkeypatch.setattr(accept_gpu, "CHECKS", (fine,))
    assert accept_gpu.main(words) == 0


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_script_runs_to_its_end_on_a_cpu(tmp_path: Path):
    output = tmp_path / "acceptance.json"
    process = subprocess.run(
        [sys.executable, SCRIPT, "--cpu", "--output", output], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]
    content = json.loads(output.read_text())
    assert list(content) == [check.name for check in accept_gpu.CHECKS]
    runs = [check.name for check in accept_gpu.CHECKS if check.runs and not check.gpus]
    assert all(content[name]["passed"] is True for name in runs)
