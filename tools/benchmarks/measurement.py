"""Interleaved timing, and the table and JSON that a benchmark leaves."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


def interleaved(
    cases: Mapping[str, Callable[[], object]], repeats: int, warm_ups: int = 1
) -> dict[str, list[float]]:
    """Wall seconds of each case: ``repeats`` rounds, in each round every case once.

    Rounds alternate in direction, so that no case always follows the same one. Progress goes to
    stderr.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(-warm_ups, repeats):
        names = list(cases) if round_ % 2 == 0 else list(reversed(cases))
        for name in names:
            _synchronize()
            began = time.perf_counter()
            cases[name]()
            _synchronize()
            took = time.perf_counter() - began
            print(f"round {round_ + 1}: {name} {took:.3f} s", file=sys.stderr, flush=True)
            if round_ >= 0:
                seconds[name].append(took)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def median(times: Sequence[float]) -> float:
    """The median, in the unit of ``times``."""
    return statistics.median(times)


def peak_memory(case: Callable[[], Any], device: str) -> tuple[int, Any]:
    """(most bytes held at a time beyond what was there before, what the case returned).

    device: ``cuda``, whose allocator counts, or ``cpu``, where the profiler's events are added up.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = case()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    with torch.profiler.profile(profile_memory=True) as profile:
        result = case()
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(
        (event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, result


@dataclass
class Report:
    """A benchmark's result. rows: strings, one per column. data: anything that JSON can hold."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """Markdown: a title, the table, the notes."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        notes = "".join(f"\n{note}" for note in self.notes)
        return f"{self.title} ({machine()})\n\n{table}\n{notes}"


def machine() -> str:
    """The processor or GPU, threads and torch version."""
    if torch.cuda.is_available() and torch.version.cuda and torch.cuda.is_initialized():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__.split('+')[0]}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "CPU"


def write_report(report: Report, path: Path) -> None:
    """The report as JSON, replaced in one step."""
    content = {**vars(report), "machine": machine()}
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
