"""Say whether RMT does on this machine's GPU what its tests say that it does on a CPU.

    python tools/accept_gpu.py                      one GPU; two or more add the parallel checks
    python tools/accept_gpu.py --only head flex     the checks whose names begin so
    python tools/accept_gpu.py --cpu                the forms of the checks that a CPU has

It prints a table and what to do about each failure, writes ``acceptance.json`` (versions, numbers;
to be pasted into an issue) and ends with 1 if a check failed. A check that crashes or hangs fails,
and the others go on; ``--minutes`` bounds them all. Without a GPU it takes ``--cpu`` by itself;
what then needs a GPU says so and states no number.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]
if __name__ == "__main__":
    # Before torch is there; who imports this module has settings of their own.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

ON_CPU = "--cpu" in sys.argv or not torch.cuda.is_available()
GPUS = 0 if ON_CPU else torch.cuda.device_count()

from acceptance.apart import carry_out_all, results
from acceptance.check import NEEDS_A_GPU, Check, Found, Machine
from acceptance.checks import CHECKS

# A busy core takes longer than the limits say.
PATIENCE_ON_CPU = 10
# Of the table; acceptance.json holds all of it.
WIDEST = 64


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
        return Found.error(error)


def table(rows: Sequence[tuple[Check, Found, float]]) -> str:
    """One line for each check: passed or not, what was found, the bound, seconds."""
    words = {True: "ok", False: "FAILED", None: "-"}
    lines = [
        [
            check.name,
            check.says,
            words[found.passed],
            found.value if len(found.value) <= WIDEST else f"{found.value[: WIDEST - 3]}...",
            found.bound,
            f"{seconds:.0f} s",
        ]
        for check, found, seconds in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[5]]
        )
        for line in lines
    )


def failures(rows: Sequence[tuple[Check, Found, float]]) -> str:
    """What failed, in full, and what to do about it."""
    return "\n".join(
        f"\n{check.name}: {found.value}\n  {check.remedy}"
        for check, found, _ in rows
        if found.passed is False
    )


def main(words: Sequence[str] | None = None) -> int:
    """Carry out the checks; 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="the forms for a CPU")
    parser.add_argument("--only", nargs="+", help="checks whose names begin with one of these")
    parser.add_argument("--runs", choices=("all", "none"), default="all", help="whole runs as well")
    parser.add_argument("--minutes", type=float, default=40, help="of all checks (default 40)")
    parser.add_argument("--keep", type=Path, help="folder for what runs print and write")
    parser.add_argument("--output", type=Path, default=Path("acceptance.json"))
    # Of the process that carries out the checks: where it writes, its folder, a pipe, their names.
    parser.add_argument("--apart", nargs="+", help=argparse.SUPPRESS)
    flags = parser.parse_args(words)
    checks = {check.name: check for check in CHECKS}
    on_cpu = ON_CPU or flags.cpu
    if flags.apart:
        folder, cpu_ranks, descriptor, *names = flags.apart
        device = torch.device("cpu") if on_cpu else torch.device("cuda", 0)
        machine = Machine(device, GPUS, Path(folder))
        carry_out_all(
            int(descriptor),
            names,
            lambda name: carry_out(checks[name], machine, cpu_ranks == "True"),
        )
        return 0
    wanted = tuple(flags.only or [""])
    chosen = [check for check in CHECKS if check.name.startswith(wanted)]
    if not chosen:
        parser.error(f"--only is {' '.join(wanted)}; known are {', '.join(checks)}")
    if flags.keep and flags.keep.exists() and any(flags.keep.iterdir()):
        parser.error(f"--keep is {flags.keep}, which holds something; name a new folder.")
    patience = PATIENCE_ON_CPU if on_cpu else 1
    limits = {
        own.name: patience * own.limit for own in chosen if not (own.runs and flags.runs == "none")
    }
    rows: list[tuple[Check, Found, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(flags.keep or temporary)
        os.makedirs(folder, exist_ok=True)
        command = [sys.executable, __file__, *["--cpu"] * on_cpu, "--apart", folder]
        command.append(str(flags.only is not None))
        log = Path(folder, "log")
        for name, found, seconds in results(limits, command, log, 60 * flags.minutes):
            rows.append((checks[name], found, seconds))
            print(table(rows[-1:]), file=sys.stderr, flush=True)
    print(table(rows))
    print(failures(rows))
    counted = Counter(found.passed for _, found, _ in rows)
    spent = sum(seconds for _, _, seconds in rows)
    print(
        f"\n{counted[True]} hold, {counted[False]} failed, {counted[None]} state no bound or were "
        f"not carried out; {spent / 60:.0f} minutes; written to {flags.output}"
    )
    content = {
        check.name: asdict(found) | {"seconds": round(seconds, 1)} for check, found, seconds in rows
    }
    flags.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(counted[False] > 0)


if __name__ == "__main__":
    # Whoever ends this ends the process of the checks as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
