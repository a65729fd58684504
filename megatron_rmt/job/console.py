"""A training run on the screen of a person: one short line for each step, and no noise.

For programs of this repository (``examples``, ``tools``). A job of the user's own keeps Megatron's
output as it is: nothing here is imported there.
"""

import argparse
import atexit
import functools
import inspect
import logging
import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import megatron_rmt
from megatron_rmt.job.checkpoints import save_problem
from megatron_rmt.job.metrics import PREFIX
from megatron_rmt.job.tracking import Forgiving

LOG = "megatron.log"

# What a step's line shows of the metrics, where they were measured.
SHOWN = {
    "budget": "budget {:.0f}",
    "thought length": "thought {:.1f}",
    "match rate": "match {:.1%}",
    "information gain": "gain {:+.3f}",
    "reward": "reward {:.3f}",
    "warm-up loss": "warm-up loss {:.3f}",
    "next-token accuracy": "next token {:.1%}",
    "lm loss": "ntp loss {:.3f}",
}

# Why libraries warn, by what they say; the first that fits.
CAUSES = {
    "apex or Transformer Engine not installed": r"apex|transformer.engine",
    "deprecations": r"deprecat|futurewarning|will be removed|has been changed",
    "no CUDA": r"cuda",
    "others": "",
}

_CHECKOUT = Path(megatron_rmt.__file__).resolve().parents[1]
_OWN = tuple(f"{_CHECKOUT / folder}{os.sep}" for folder in ("megatron_rmt", "examples", "tools"))


def step_line(iteration: int, last: int, values: Mapping[str, Any]) -> str:
    """A step in one line, as far as it was measured.

    iteration: 1 for the first of ``last``. values: what Megatron reports of the step, by its names
    there; NaN stands for what was not measured, and there is none at all if the step was skipped.
    """
    measured = {name.removeprefix(PREFIX): float(value) for name, value in values.items()}
    if measured.get("warm-up loss") == 0.0:
        del measured["warm-up loss"]  # the warm-up is over
    parts = [f"step {iteration:{len(str(last))}}/{last}"]
    parts += [
        text.format(measured[name])
        for name, text in SHOWN.items()
        if math.isfinite(measured.get(name, math.nan))
    ]
    seconds = [value for name, value in measured.items() if name.endswith(" seconds")]
    if seconds:
        parts.append(f"{sum(seconds):.1f} s")
    return " | ".join(parts if measured else [*parts, "skipped"])


def a_line_for_each_step() -> None:
    """From now on stdout has one line for each step, and a file what Megatron prints.

    The file is ``megatron.log`` in the folder that ``--save`` names on the command line; all ranks
    append to it. Without ``--save`` Megatron prints as ever.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--save")
    folder = parser.parse_known_args()[0].save
    if folder is None:
        return
    from megatron.training import get_args, training

    if "://" in folder or save_problem(folder):
        return  # refused later, in one sentence
    path = Path(folder) / LOG
    log = Forgiving(path.open("a", encoding="utf-8", buffering=1), str(path))
    stdout, sys.stdout = sys.stdout, log
    for handler in logging.root.handlers:
        # Megatron's logging took its stdout when it was imported.
        if getattr(handler, "stream", None) is stdout:
            handler.setStream(sys.stdout)
    screen = Forgiving(stdout, "the line of each step")
    training_log, print_rank_last = training.training_log, training.print_rank_last

    def show(line: str) -> None:
        if _is_last_rank():
            print(line, file=screen, flush=True)

    @functools.wraps(training_log)
    def log_step(*args: Any, **kwargs: Any) -> Any:
        training.print_rank_last = print_rank_last
        result = training_log(*args, **kwargs)
        training.print_rank_last = print_and_show
        call = inspect.signature(training_log).bind(*args, **kwargs).arguments
        show(step_line(call["iteration"], get_args().train_iters, call["loss_dict"]))
        return result

    @functools.wraps(print_rank_last)
    def print_and_show(message: Any) -> None:
        # Losses on held-out data, which are for a person too.
        print_rank_last(message)
        show(message)

    show(f"A line for each step; all that Megatron prints is in {path}")
    training.training_log, training.print_rank_last = log_step, print_and_show


def _is_last_rank() -> bool:
    """Whether this is the rank that Megatron lets log, also before the ranks have met."""
    return int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1


def leave_out_library_warnings() -> None:
    """Count the warnings of libraries instead of showing them; one line at the end says how many.

    Warnings that this package, the examples and the tools give are shown. So are all where the user
    has said which to show (``PYTHONWARNINGS``, ``python -W``).
    """
    if sys.warnoptions:
        return
    left_out: Counter[str] = Counter()
    show = warnings.showwarning

    def show_own(
        message: Warning | str, category: type[Warning], filename: str, *place: Any
    ) -> None:
        if filename.startswith(_OWN) or _warner(sys._getframe(1)).startswith(_OWN):
            show(message, category, filename, *place)
        else:
            left_out[_cause(f"{category.__name__}: {message}")] += 1

    def count_record(record: logging.LogRecord) -> bool:
        left_out[_cause(record.getMessage())] += 1
        return False

    warnings.showwarning = show_own
    # Torch logs that there is no CUDA runtime.
    logging.getLogger("torch.utils.cpp_extension").addFilter(count_record)
    # Processes that write checkpoints import the script again, and have nothing to tell.
    is_helper = any("from multiprocessing" in word for word in sys.orig_argv)
    if _is_last_rank() and not is_helper:
        atexit.register(_tell, left_out)


def _warner(frame: FrameType | None) -> str:
    """The file that gave the warning, which may have blamed a caller (``stacklevel``) for it."""
    while frame is not None and frame.f_code.co_filename == warnings.__file__:
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_filename


def _cause(text: str) -> str:
    return next(cause for cause, said in CAUSES.items() if re.search(said, text, re.IGNORECASE))


def _tell(left_out: Counter[str]) -> None:
    if left_out:
        causes = ", ".join(cause for cause in CAUSES if left_out[cause])
        print(
            f"{left_out.total()} warnings of libraries were left out ({causes}): "
            "PYTHONWARNINGS=default shows them",
            file=sys.stderr,
        )
