"""One JSON line per training step, beside Megatron's own log, TensorBoard and wandb.

A resumed run writes its iterations again; whoever reads the file takes the last line of each.
"""

import errno
import json
import math
import os
import stat
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rmt.job.tracking import never_ending_training

PREFIX = "rmt "
# In bytes; the end of a file in which the start of its last line is looked for.
LONGEST_LINE = 2**20


def metrics_path(args: Namespace) -> Path | None:
    """Where the lines go: ``--rmt-metrics-file``, else into ``--save``, else nowhere."""
    if args.rmt_metrics_file:
        return Path(args.rmt_metrics_file)
    return Path(args.save) / "rmt_metrics.jsonl" if args.save else None


def write_metrics(path: Path, iteration: int, values: dict[str, Any]) -> None:
    """Append one line for ``iteration`` (1 for the first); what was not measured becomes null."""
    line: dict[str, float | int | None] = {"iteration": iteration}
    for name, value in values.items():
        number = math.nan if value is None else float(value)
        line[name.removeprefix(PREFIX)] = number if math.isfinite(number) else None
    append_lines(path, [json.dumps(line)])


def amend_metrics(path: Path, iteration: int, values: dict[str, Any]) -> None:
    """Append the line of ``iteration`` once more, with ``values``, where it is the last one; else a
    line of these alone."""
    with never_ending_training(str(path)):
        last = _last_line(path)
        known = last if last.pop("iteration", None) == iteration else {}
        write_metrics(path, iteration, {**known, **values})


def _last_line(path: Path) -> dict[str, Any]:
    """The last line of the file that is whole; nothing if there is none."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_LINE))
        lines = file.read().splitlines()
    try:
        return dict(json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError):
        return {}


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append JSON lines to a file, made with its folder if it is not there; all of them or none.

    What cannot be written is said once, see ``tracking``. Half a line that a full disk or a crash
    left behind is taken back.
    """
    content = "".join(f"{line}\n" for line in lines).encode()
    with never_ending_training(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0, opener=_without_waiting) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            if regular:
                content = _end_last_line(path) + content
            end = os.fstat(file.fileno()).st_size
            try:
                while content:
                    # A disk that is nearly full takes a part, a pipe that is full none.
                    taken = file.write(content)
                    if taken is None:
                        raise BlockingIOError(errno.EAGAIN, "its reader does not read")
                    content = content[taken:]
            except OSError:
                if regular:
                    file.truncate(end)
                raise


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody reads is an error, where one would wait for a reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _end_last_line(path: Path) -> bytes:
    """What the last line of the file lacks; a line of which only a part is there is cut off."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LONGEST_LINE))
        _, newline, last = file.read().rpartition(b"\n")
        if not last:
            return b""
        try:
            json.loads(last)
        except ValueError:
            if last.startswith(b"{") and (newline or size <= LONGEST_LINE):
                file.truncate(size - len(last))
                return b""
        return b"\n"
