"""Whole runs of a tiny model: a reference, layouts, precisions and a resumed run against it."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from acceptance.check import Found, Machine
from tests.distributed import REPOSITORY
from tests.tiny_run import RMT, STEPS, TinyInputs, build_inputs

PRETRAIN = REPOSITORY / "examples/pretrain_rmt.py"
# A rank that waits for another this long hangs.
LIMIT = 600


@functools.cache
def _inputs(folder: Path) -> TinyInputs:
    return build_inputs(folder / "inputs")


def _run(
    machine: Machine,
    name: str,
    ranks: int,
    flags: Sequence[str],
    resume_from: Path | None = None,
) -> list[dict[str, float]]:
    """The lines of the metrics of a run, which is made once.

    Raises:
        RuntimeError: it failed or hangs; with its last lines.
    """
    folder = machine.folder / name
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        folder.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc-per-node", str(ranks), str(PRETRAIN)]
        words += [*_inputs(machine.folder).flags(resume_from), *RMT]
        words += ["--rmt-metrics-file", str(metrics), *flags]
        environment = dict(os.environ) | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        environment["PYTHONPATH"] = str(REPOSITORY)
        environment.pop("TRITON_INTERPRET", None)
        try:
            done = subprocess.run(
                words, env=environment, capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{name} did not end within {LIMIT} s") from None
        (folder / "log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise RuntimeError(f"{name} failed: {' '.join(last)[:200]} ({folder / 'log'})")
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _apart(lines: list[dict[str, float]], others: list[dict[str, float]], name: str) -> float:
    return max(abs(a[name] - b[name]) for a, b in zip(lines, others, strict=True))


def rollouts_and_update(machine: Machine, flags: Sequence[str], bound: float) -> Found:
    """Mean |log-prob in the update - when drawn| of each step."""
    lines = _run(machine, "-".join(["agree", *flags]).replace("/", "_"), 1, flags)
    differences = {f"step {i}": line["logprob difference"] for i, line in enumerate(lines, 1)}
    found = Found.below(differences, bound)
    return found if len(lines) == STEPS else Found(False, f"{len(lines)} steps", str(STEPS))


def resumed(machine: Machine) -> Found:
    """A run that is stopped after 3 of 6 steps and goes on, against one that is not."""
    saved = machine.folder / "saved"
    whole = _run(machine, "whole", 1, ["--bf16", "--save", str(saved), "--save-interval", "3"])
    second = _run(machine, "resumed", 1, ["--bf16", "--ckpt-step", "3"], resume_from=saved)
    errors = {name: _apart(whole[3:], second, name) for name in ("ntp loss", "grad norm")}
    return Found.below(errors, 1e-3)


def layout(machine: Machine, ranks: int, flags: str) -> Found:
    """The curve of several ranks against that of one, fp32."""
    one = _run(machine, "one", 1, [])
    several = _run(machine, flags.replace(" ", "") or "dp", ranks, flags.split())
    names = ("ntp loss", "reward", "grad norm")
    return Found.below({name: _apart(several, one, name) for name in names}, 1e-3)
