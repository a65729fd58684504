"""Show what happened in one or several runs: one page of HTML that needs nothing but itself.

    python tools/report.py runs/my-run --output report.html
    python tools/report.py RMT=runs/a RPT=runs/b before.json after.json study.json \\
        --output report.html --watch 60

Each input is a run (its --save folder, or its metrics file), an output of evaluate.py, or the
tables of a study; NAME=PATH names it on the page. Evaluations are shown in the order given, the
newest last. A study is a JSON object ``{"tables": [{"title": "...", "note": "...", "columns":
["arm", "accuracy"], "rows": [["RMT", {"value": 0.27, "low": 0.23, "high": 0.3}]]}]}``, whose cells
are text, numbers, null, or a value with its interval.

A run may still be going on, or lack some of its files: the page shows what is there
(rmt_metrics.jsonl; rmt_samples.jsonl and rmt_texts.jsonl, which --rmt-log-samples-interval writes).
Nothing is written but --output, which is replaced in one go, so that it is whole at any time.
"""

import argparse
import contextlib
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from reporting.page import page
from reporting.reading import files_of, read_inputs


def write_report(
    inputs: Sequence[str], output: Path, title: str, every: float | None = None
) -> None:
    """Read ``inputs`` and replace ``output``. every: seconds until it is written again.

    Raises:
        ValueError: an input is none, or ``output`` cannot be written.
    """
    found = read_inputs(inputs, waits=every is not None)
    names = [run.name for run in found.runs] + [one.name for one in found.evaluations]
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    shown = title or f"RMT: {', '.join(dict.fromkeys(names)) or 'a study'}"
    text = page(found, title=shown, written=now, every=every)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace(output, text.encode(errors="replace"))
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written: {error.strerror}.") from None


def replace(path: Path, content: bytes) -> None:
    """Give ``path`` this content in one go: who reads it sees the old or the new one.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def watch(inputs: Sequence[str], output: Path, title: str, seconds: float) -> None:
    """Write the report again whenever a file has changed, until interrupted. What goes wrong after
    the first time is said once, and the last page stays.

    Raises:
        ValueError: see ``write_report``, the first time.
    """
    seen, told = _stamps(inputs), ""
    write_report(inputs, output, title, seconds)
    print(f"{output}: written, and again every {seconds:g} s; Ctrl-C ends it.", flush=True)
    while True:
        time.sleep(seconds)
        now = _stamps(inputs)
        if now == seen:
            continue
        seen = now
        try:
            write_report(inputs, output, title, seconds)
            told = ""
        except ValueError as error:
            if str(error) != told:
                told = str(error)
                print(f"report.py: {error}", file=sys.stderr, flush=True)


def _stamps(inputs: Sequence[str]) -> list[tuple[int, int] | None]:
    """Size and time of each file; None where there is none."""
    found: list[tuple[int, int] | None] = []
    for file in files_of(inputs):
        try:
            status = file.stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_size, status.st_mtime_ns))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report; bad input ends it with one sentence."""
    parser = argparse.ArgumentParser(
        prog="report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="[NAME=]PATH", help="run, evaluation or study, see above")
    add("--output", type=Path, required=True, help="page to be written (.html)")
    add("--title", default="", help="of the page (default: the names of its inputs)")
    add("--watch", type=float, metavar="SECONDS", help="write it again, at least 1 s apart")
    flags = parser.parse_args(arguments)
    try:
        # So that no input, such as a run's metrics, is ever replaced.
        if flags.output.suffix.lower() not in (".html", ".htm") or flags.output.is_dir():
            raise ValueError(f"--output is {flags.output}; name a file that ends in .html.")
        if flags.watch is None:
            write_report(flags.inputs, flags.output, flags.title)
            print(f"{flags.output}: {flags.output.stat().st_size / 1024:,.0f} KiB")
            return
        if not 1 <= flags.watch <= 86400:
            raise ValueError(f"--watch is {flags.watch:g}; pass 1 to 86400 seconds.")
        watch(flags.inputs, flags.output, flags.title, flags.watch)
    except ValueError as error:
        sys.exit(f"report.py: {error}")
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    # A training beside it comes first.
    os.nice(10)
    main()
