"""The acceptance script: its checks hold on a CPU, what needs a GPU says so, failures count."""

import importlib
import json
import os
import runpy
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import REPOSITORY
from tests.null_cuda import device

sys.path.insert(0, str(REPOSITORY / "tools"))

import accept_gpu
from acceptance import apart, draws, numbers
from acceptance.check import NEEDS_A_GPU, Check, Found, Machine
from acceptance.checks import CHECKS
from megatron_rmt.rollout import kv_cache

SCRIPT = REPOSITORY / "tools/accept_gpu.py"
CPU = Machine(torch.device("cpu"), gpus=0, folder=Path())
BY_NAME = {check.name: check for check in CHECKS}


def _carried_out(check: Check) -> Found:
    return accept_gpu.carry_out(check, CPU, cpu_ranks=False)


@pytest.mark.parametrize(
    "check",
    [check for check in CHECKS if not (check.gpus or check.runs)],
    ids=lambda check: check.name,
)
def test_what_has_a_form_for_a_cpu_holds_on_it(check: Check):
    found = _carried_out(check)
    assert found.passed is not False, found
    assert found.numbers or found.bound


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check.gpus], ids=lambda check: check.name
)
def test_what_needs_a_gpu_says_so_and_states_no_number(check: Check):
    assert _carried_out(check) == Found(None, NEEDS_A_GPU)


def test_every_check_has_a_name_of_its_own_and_says_what_to_do():
    assert len(BY_NAME) == len(CHECKS)
    assert all(check.remedy.endswith(".") for check in CHECKS)


def test_only_the_program_itself_chooses_an_allocator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    importlib.reload(accept_gpu)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--help"])
    # What it sets is taken back after the test.
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    del os.environ["PYTORCH_CUDA_ALLOC_CONF"]
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def _changed(function: Callable[..., Any], **changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """``function`` with other values of the arguments that are named."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        kwargs |= {name: change(kwargs[name]) for name, change in changes.items()}
        return function(*args, **kwargs)

    return changed


def test_a_gpu_that_computes_something_else_fails(monkeypatch: pytest.MonkeyPatch):
    exact, attend, rows_of = numbers.token_loss_sum, numbers.attend_by_limits, numbers.rows_of
    of_rollouts, store = kv_cache.decode_attention, numbers.store_rotated
    for owner, name, wrong, check in (
        (
            numbers,
            "token_loss_sum",
            lambda hidden, *others, **named: exact(1.001 * hidden, *others, **named),
            "head-fp32",
        ),
        (
            numbers,
            "uniforms",
            lambda *keys: torch.rand(8, dtype=torch.float64),
            "random",
        ),
        (
            draws,
            "sample_tokens",
            _changed(draws.sample_tokens, temperature=lambda value: 1.1 * value),
            "sampler",
        ),
        (
            numbers,
            "attend_by_limits",
            lambda *args: attend(*args[:-1], 1.03 * args[-1]),
            "decode-std6",
        ),
        (
            numbers,
            "store_rotated",
            lambda query, key, *others: store(query, 1.01 * key, *others),
            "decode-store",
        ),
        (
            kv_cache,
            "decode_attention",
            lambda *args: of_rollouts(*args[:4], 1.3 * args[4], *args[5:]),
            "decode-graph",
        ),
        (
            numbers,
            "rows_of",
            lambda hidden, *rest, **named: rows_of(
                hidden * (1 + 1e-4 * torch.rand(())), *rest, **named
            ),
            "repeated-rows",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrong)
            found = _carried_out(BY_NAME[check])
        assert found.passed is False, (check, found)
        assert not found.broke


def test_a_bound_is_kept_by_every_number_and_nan_keeps_none():
    assert Found.below({"a": 1e-3, "b": 2e-3}, 1e-2).passed
    assert Found.below({"a": 1e-3, "b": 2e-3}, 1e-2).value == "0.002 (b)"
    assert Found.below({"a": 2e-2, "b": 0.0}, 1e-2).passed is False
    assert Found.below({"a": float("nan"), "b": 1.0}, 1e-2).value == "nan (a)"
    assert Found.below({"a": float("nan"), "b": 0.0}, 1e-2).passed is False


def _rows(*found: Found) -> list[tuple[Check, Found, float]]:
    return [(BY_NAME[name], own, 1.0) for name, own in zip(BY_NAME, found, strict=False)]


def test_a_failure_ends_with_one_and_says_in_full_what_was_found_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "acceptance.json"
    words = ["--cpu", "--output", str(output)]
    long = "an illegal memory access was encountered " * 5
    rows = _rows(Found(None, "no GPU"), Found(False, long, broke=True), Found(True, "1", "> 0"))

    def results(limits: Any, command: Any, log: Any, seconds: float) -> Any:
        yield from ((check.name, found, spent) for check, found, spent in rows)

    monkeypatch.setattr(accept_gpu, "results", results)
    assert accept_gpu.main(words) == 1
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line.split()[0] for line in lines[:3]] == [check.name for check, _, _ in rows]
    assert max(map(len, lines[:3])) < 160
    assert f"{rows[1][0].name}: {long}\n  {rows[1][0].remedy}" in printed
    assert "1 hold, 1 failed, 1 state no bound" in printed
    content = json.loads(output.read_text())
    assert content[rows[1][0].name] | {"numbers": {}} == {
        "passed": False,
        "value": long,
        "bound": "",
        "numbers": {},
        "broke": True,
        "seconds": 1.0,
    }
    rows = [rows[0], rows[2]]
    assert accept_gpu.main(words) == 0


# What a check may do to its process; each name is a line of it.
WORKER = """
    import ctypes, os, sys, time
    sys.path.insert(0, {tools!r})
    from acceptance.apart import carry_out_all
    from acceptance.check import Found

    def carry_out(name):
        if name == "raises":
            raise RuntimeError("an error\\nof two lines")
        if name == "crashes":
            print("about to crash", flush=True)
            ctypes.string_at(0)
        if name == "leaves":
            os._exit(3)
        if name == "hangs":
            time.sleep(600)
        return Found(True, name)

    carry_out_all(int(sys.argv[1]), sys.argv[2:], carry_out)
"""


def _apart(limits: dict[str, float], tmp_path: Path, seconds: float = 60) -> dict[str, Found]:
    program = tmp_path / "worker.py"
    program.write_text(textwrap.dedent(WORKER.format(tools=str(REPOSITORY / "tools"))))
    command = [sys.executable, str(program)]
    log = tmp_path / "log"
    return {name: found for name, found, _ in apart.results(limits, command, log, seconds)}


def test_a_check_that_crashes_hangs_or_raises_stops_no_other(tmp_path: Path):
    names = ["first", "raises", "second", "crashes", "third", "hangs", "leaves", "last"]
    began = time.monotonic()
    found = _apart({name: 2.0 if name == "hangs" else 60.0 for name in names}, tmp_path)
    assert time.monotonic() - began < 50
    assert list(found) == names
    for name in ("first", "second", "third", "last"):
        assert found[name] == Found(True, name)
    assert found["raises"].value == "RuntimeError: an error of two lines"
    assert found["crashes"].value == "its process ended, SIGSEGV: about to crash"
    assert found["hangs"].value == "did not end within 2 s"
    assert found["leaves"].value.startswith("its process ended, exit code 3")
    assert all(found[name].passed is False for name in ("raises", "crashes", "hangs", "leaves"))


def test_all_checks_together_end_in_time(tmp_path: Path):
    found = _apart({"first": 60.0, "hangs": 60.0, "second": 60.0}, tmp_path, seconds=4)
    assert found["first"].passed
    assert "did not end within" in found["hangs"].value
    assert found["second"] == Found(False, "not begun within 4 s")


def test_a_process_that_does_not_start_fails_all_checks_once(tmp_path: Path):
    command = [sys.executable, "-c", "raise SystemExit('no such package')"]
    limits = {"first": 60.0, "second": 60.0}
    found = list(apart.results(limits, command, tmp_path / "log", 60))
    assert [name for name, _, _ in found] == ["first", "second"]
    assert all("no such package" in own.value for _, own, _ in found)


def _whole(tmp_path: Path, *flags: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    output = tmp_path / "acceptance.json"
    process = subprocess.run(
        [sys.executable, SCRIPT, "--output", output, *flags],
        capture_output=True,
        text=True,
        env=environment or None,
    )
    assert output.exists(), process.stderr[-2000:]
    return process.returncode, json.loads(output.read_text()), process.stdout


@pytest.mark.multiprocess
def test_the_script_carries_out_what_it_is_asked_for(tmp_path: Path):
    code, content, printed = _whole(tmp_path, "--cpu", "--only", "versions", "random")
    assert code == 0, printed
    assert list(content) == ["versions", "random"]
    assert content["random"]["passed"] is True


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_script_runs_to_its_end_on_a_cpu(ranks: int, tmp_path: Path):
    # What asks for two GPUs runs on two ranks of a CPU where it is named.
    names = ["run-inputs", *(name for name, check in BY_NAME.items() if check.gpus == 2)]
    chosen = ["--only", *names] if ranks == 2 else []
    code, content, printed = _whole(tmp_path, "--cpu", "--minutes", "300", *chosen)
    assert code == 0, printed
    assert list(content) == (names if ranks == 2 else list(BY_NAME))
    carried_out = names if ranks == 2 else ["run-fp32", "run-bf16", "run-resumed"]
    assert all(content[name]["passed"] is True for name in carried_out), content


@pytest.mark.slow
@pytest.mark.null_cuda
def test_the_script_runs_to_its_end_on_a_device_that_computes_nothing(
    tmp_path: Path, pytestconfig: pytest.Config
):
    if lacking := device.lacking():
        pytest.skip(lacking)
    built = device.build(pytestconfig.cache.mkdir("null_cuda"))
    flags = ("--runs", "none", "--minutes", "60")
    environment = device.environment(built) | {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    code, content, printed = _whole(tmp_path, *flags, **environment)
    assert code == 1, printed
    assert list(content) == [name for name, check in BY_NAME.items() if not check.runs]
    for name in ("random", "sampler", "head-fp32", "flex", "decode-std6", "repeated-rows"):
        assert content[name]["passed"] is False, (name, content[name])
        assert not content[name]["broke"], (name, content[name])
