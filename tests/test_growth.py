"""A long run does not grow: neither its memory nor its open files."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_run import PRETRAIN, RMT, TinyInputs, run

pytestmark = pytest.mark.faults

STEPS, SETTLED = 300, 100

# The example, which notes its resident bytes and its open files after each step.
PROGRAM = """
import json, os, runpy

import megatron_rmt

if __name__ == "__main__":
    megatron_rmt.patch()
    from megatron_rmt.job import patches

    run_step, log = patches.run_step, open("GROWTH", "w")

    def noted(original, call, run):
        result = run_step(original, call, run)
        pages = int(open("/proc/self/statm").read().split()[1])
        print(json.dumps([pages * os.sysconf("SC_PAGESIZE"), len(os.listdir("/proc/self/fd"))]),
              file=log, flush=True)
        return result

    patches.run_step = noted
    runpy.run_path("PRETRAIN", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_resident_memory_grows_by_less_than_1_kib_a_step_and_open_files_do_not(
    inputs: TinyInputs, tmp_path: Path
):
    program = tmp_path / "program.py"
    growth = tmp_path / "growth"
    program.write_text(PROGRAM.replace("GROWTH", str(growth)).replace("PRETRAIN", str(PRETRAIN)))
    flags = inputs.flags()
    flags[flags.index("--train-iters") + 1] = str(STEPS)
    run(tmp_path / "logs", 1, [*flags, *RMT], program)

    notes = np.array([json.loads(line) for line in growth.read_text().splitlines()])
    assert len(notes) == STEPS
    resident, files = notes[SETTLED:].T
    # The median over pairs of steps is not moved by a block that is taken once.
    half = len(resident) // 2
    slope = np.median((resident[half:] - resident[:half]) / half)
    print(f"resident memory grows by {slope:.0f} bytes a step")
    assert slope < 1024, f"{slope:.0f} bytes a step, {resident[0]:,} to {resident[-1]:,}"
    assert len(set(files.tolist())) == 1, files
