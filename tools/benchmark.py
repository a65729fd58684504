"""Measure megatron_rmt against what other frameworks do, in one process, on this machine.

    python tools/benchmark.py update      one update: trunk, stems and branches
    python tools/benchmark.py head        the language-model head: log-probs, gradients
    python tools/benchmark.py rollout     one step's rollouts
    python tools/benchmark.py reward      a step with each reward and selection

Each prints its table; ``--json FILE`` also writes it with every single time. Cases are interleaved
and medians compared, so that a machine whose speed drifts gives the same ratios; absolute times are
of this machine only. Run it while nothing else does.
"""

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks.measurement import Report, write_report
from megatron_rmt.job import console

COMMANDS = {
    "update": "benchmarks.update",
    "head": "benchmarks.head",
    "rollout": "benchmarks.rollout",
    "reward": "benchmarks.reward",
}


def main() -> None:
    """Run one benchmark; bad input ends it with one sentence."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(__doc__)
        sys.exit(0 if name in ("-h", "--help") else f"benchmark.py: name one of {[*COMMANDS]}.")
    module = importlib.import_module(COMMANDS[name])
    parser = argparse.ArgumentParser(
        prog=f"benchmark.py {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of a case (default 5)")
    parser.add_argument("--json", type=Path, help="write the table and every time to this file")
    module.add_arguments(parser)
    flags = parser.parse_args(sys.argv[2:])
    try:
        if flags.repeats < 1:
            raise ValueError(f"--repeats is {flags.repeats}; pass 1 or more.")
        report: Report = module.run(flags)
    except ValueError as error:
        sys.exit(f"benchmark.py {name}: {error}")
    print(report.table())
    if flags.json:
        write_report(report, flags.json)


if __name__ == "__main__":
    console.leave_out_library_warnings()
    main()
