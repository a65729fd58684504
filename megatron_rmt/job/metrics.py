"""One JSON line per training step, beside Megatron's own log, TensorBoard and wandb.

A resumed run writes its iterations again; whoever reads the file takes the last line of each.
"""

import json
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PREFIX = "rmt "


def metrics_path(args: Namespace) -> Path | None:
    """Where the lines go: ``--rmt-metrics-file``, else into ``--save``, else nowhere."""
    if args.rmt_metrics_file:
        return Path(args.rmt_metrics_file)
    return Path(args.save) / "rmt_metrics.jsonl" if args.save else None


def write_metrics(path: Path, iteration: int, values: dict[str, Any]) -> None:
    """Append one line for ``iteration`` (1 for the first); what was not measured becomes null."""
    line: dict[str, float | int | None] = {"iteration": iteration}
    for name, value in values.items():
        number = float(value)
        line[name.removeprefix(PREFIX)] = number if math.isfinite(number) else None
    append_lines(path, [json.dumps(line)])


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append whole lines to a file, made with its folder if it is not there.

    One write, so that a crash leaves no half line behind a whole one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
