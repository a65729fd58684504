"""A program on some ranks of this machine, which may hang."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from acceptance.check import Machine

TOOLS = Path(__file__).resolve().parents[1]
REPOSITORY = TOOLS.parent


def run_program(
    machine: Machine, name: str, ranks: int, words: Sequence[str], limit: float
) -> None:
    """``torchrun words``; what it prints is kept in ``name`` of the machine's folder.

    Raises:
        RuntimeError: it failed, or took longer than ``limit`` seconds; with its last line.
    """
    log = machine.folder / f"{name}.log"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *words]
    environment = dict(os.environ) | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    paths = [str(TOOLS), str(REPOSITORY), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment.pop("TRITON_INTERPRET", None)
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{name} did not end within {limit:.0f} s") from None
        finally:
            # torchrun ends its ranks.
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode:
        raise RuntimeError(f"{name} failed: {_reason(log)}")


def _reason(log: Path) -> str:
    """The last line that names an error, without the summary of torchrun."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return " ".join((named or [line for line in lines if line.strip()] or [""])[-1].split())[:300]
