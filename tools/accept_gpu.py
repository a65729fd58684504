"""Say whether RMT does on this machine's GPU what its tests say that it does on a CPU.

    python tools/accept_gpu.py                      one GPU; two or more add the parallel checks
    python tools/accept_gpu.py --only head flex     the checks whose names begin so
    python tools/accept_gpu.py --cpu                the forms of the checks that a CPU has

It prints a table, writes ``acceptance.json`` (versions, numbers; to be pasted into an issue) and
ends with 1 if a check failed. Without a GPU it takes ``--cpu`` by itself; what then needs a GPU
says so and states no number.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

ON_CPU = "--cpu" in sys.argv or not torch.cuda.is_available()

from acceptance import numbers, timings, training
from acceptance.check import NEEDS_A_GPU, Check, Found, Machine

of = functools.partial
CHECKS: tuple[Check, ...] = (
    Check("versions", "card, versions, allocator", numbers.surroundings),
    Check("random", "uniform numbers, bit for bit", numbers.random_numbers),
    Check("head-fp32", "head against float64", of(numbers.head, dtype=torch.float32, bound=3e-6)),
    Check("head-bf16", "head against float64", of(numbers.head, dtype=torch.bfloat16, bound=6e-3)),
    Check("head-main-grad", "weight gradient in fp32", numbers.main_grad),
    Check("sdpa", "tree attention against float64", of(numbers.tree_attention, backend="sdpa")),
    Check("lse", "tree attention against float64", of(numbers.tree_attention, backend="lse")),
    Check("flex", "the same", of(numbers.tree_attention, backend="flex"), gpus=1),
    Check("waits", "the head waits for nothing", timings.waits, gpus=1),
    Check("speed-flex", "forward and backward", timings.flex_speed, gpus=1),
    Check("speed-head", "chunks of 384 and 4096", timings.head_speed, gpus=1),
    Check(
        "run-fp32",
        "rollouts and update agree",
        of(training.rollouts_and_update, flags=(), bound=1e-4),
        runs=True,
    ),
    Check(
        "run-bf16",
        "rollouts and update agree",
        of(training.rollouts_and_update, flags=("--bf16",), bound=5e-2),
        runs=True,
    ),
    Check("run-resumed", "goes on as if it had not stopped", training.resumed, runs=True),
    *(
        Check(
            f"layout-{name}",
            "the curve of one rank",
            of(training.layout, ranks=2, flags=flags),
            gpus=2,
            runs=True,
        )
        for name, flags in {
            "tp2": "--tensor-model-parallel-size 2",
            "pp2": "--pipeline-model-parallel-size 2",
            "dp2": "--overlap-grad-reduce",
        }.items()
    ),
)


def carry_out(check: Check, machine: Machine, cpu_ranks: bool) -> Found:
    """What ``check`` finds, or why it cannot be carried out here."""
    if machine.on_gpu and check.gpus > machine.gpus:
        return Found(None, f"needs {check.gpus} GPUs")
    if machine.on_gpu and check.name == "lse":
        return Found(None, "is for a CPU")
    if not machine.on_gpu and check.gpus and not (check.runs and cpu_ranks):
        return Found(None, NEEDS_A_GPU)
    try:
        return check.run(machine)
    except Exception as error:  # a check that breaks has failed, and the others go on
        return Found(False, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")


def table(rows: Sequence[tuple[Check, Found, float]]) -> str:
    """One line for each check: passed or not, what was found, the bound, seconds."""
    words = {True: "ok", False: "FAILED", None: "-"}
    lines = [
        [check.name, check.says, words[found.passed], found.value, found.bound, f"{seconds:.0f} s"]
        for check, found, seconds in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[5]]
        )
        for line in lines
    )


def main(words: Sequence[str] | None = None) -> int:
    """Carry out the checks; 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="the forms for a CPU")
    parser.add_argument("--only", nargs="+", help="checks whose names begin with one of these")
    parser.add_argument("--runs", choices=("all", "none"), default="all", help="whole runs as well")
    parser.add_argument("--output", type=Path, default=Path("acceptance.json"))
    flags = parser.parse_args(words)
    on_cpu = ON_CPU or flags.cpu
    wanted = tuple(flags.only or [""])
    checks = [check for check in CHECKS if check.name.startswith(wanted)]
    if not checks:
        parser.error(f"--only is {' '.join(wanted)}; known are {', '.join(c.name for c in CHECKS)}")
    rows: list[tuple[Check, Found, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cpu") if on_cpu else torch.device("cuda", 0)
        gpus = 0 if on_cpu else torch.cuda.device_count()
        machine = Machine(device, gpus, Path(folder))
        for check in checks:
            if check.runs and flags.runs == "none":
                continue
            started = time.perf_counter()
            found = carry_out(check, machine, cpu_ranks=flags.only is not None)
            rows.append((check, found, time.perf_counter() - started))
            print(table(rows[-1:]), file=sys.stderr, flush=True)
    print(table(rows))
    content = {
        check.name: asdict(found) | {"seconds": round(seconds, 1)} for check, found, seconds in rows
    }
    flags.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(found.passed is False for _, found, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
