"""What a study found: one table of accuracies, one of differences and one of costs.

A row is an arm. Values are means over the seeds; their 95 % intervals come from a bootstrap in two
levels: seeds are drawn, and within each its documents. The arms of a seed share its documents, so a
difference is of the same ones.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation import COLUMNS, RESAMPLES, Estimate, Measured, estimates, resample
from json_lines import read_rows

ALL = COLUMNS.index("all")


class Column(NamedTuple):
    """title: of a column. name: of a result of evaluate.py. scale, decimals: as shown."""

    title: str
    name: str
    scale: float = 100.0
    decimals: int = 1


MEASURES = (
    Column("thought, then answer, %", "thought"),
    Column("next token at once, %", "next_token_sampled"),
    Column("whole answer, %", "whole_answer"),
    Column("thought minus next token", "thought_minus_next_token_sampled"),
    Column("empty thought, %", "no_thought"),
    Column("another's thought, %", "swapped"),
    Column("log p after thought, nats", "thought_log_prob", 1.0, 2),
    Column("log p at once, nats", "log_prob", 1.0, 2),
    Column("perplexity", "perplexity", 1.0, 2),
    Column("tokens of a thought", "thought_length", 1.0),
    Column("well-formed, %", "well_formed"),
)
COMPARED = (
    "thought",
    "whole_answer",
    "next_token_sampled",
    "thought_log_prob",
    "log_prob",
    "perplexity",
    "thought_length",
)


@dataclass(frozen=True)
class Cost:
    """What a training run took, all ranks together.

    seconds: the steps' own time, the first of which counts as a median one, because it compiles.
    step_seconds: median. trained, generated: tokens in the update, and of rollouts. flops:
    6 P for each token that is trained and 2 P for each that rollouts read, for P weights; without
    attention.
    """

    steps: int
    seconds: float
    step_seconds: float
    trained: float
    generated: float
    flops: float


def read_cost(folder: Path) -> Cost:
    """The cost of the finished run that was saved in ``folder``.

    Raises:
        ValueError: its logs do not tell.
    """
    log = (folder / "megatron.log").read_text(encoding="utf-8", errors="replace")
    line = r"iteration +(\d+)/ *\d+ \|.*elapsed time per iteration \(ms\): ([0-9.]+)"
    # A run that was started again says some of it twice.
    times = dict(re.findall(line, log))
    weights = dict(re.findall(r"number of parameters on (\(.*\)): (\d+)", log))
    sizes = dict(re.findall(r"^ +(seq_length|global_batch_size) \.+ (\d+)$", log, re.MULTILINE))
    if not times or not weights or len(sizes) < 2:
        raise ValueError(f"{folder}/megatron.log is not of a whole run; remove it and run again.")
    seconds = [float(time) / 1000 for time in times.values()]
    median = statistics.median(seconds)
    parameters = sum(map(int, weights.values()))
    rows = dict[int, dict[str, Any]]()
    if (folder / "rmt_metrics.jsonl").exists():
        found = (row.values for row in read_rows(folder / "rmt_metrics.jsonl"))
        rows = {row["iteration"]: row for row in found if "branch tokens" in row}
    read = sum(
        row[f"{part} tokens"] for row in rows.values() for part in ("trunk", "stem", "branch")
    )
    trained = read or len(seconds) * int(sizes["seq_length"]) * int(sizes["global_batch_size"])
    return Cost(
        steps=len(seconds),
        seconds=median + sum(seconds[1:]),
        step_seconds=median,
        trained=trained,
        generated=sum(row["branch tokens"] for row in rows.values()),
        flops=parameters * (6 * trained + 2 * read),
    )


def over_seeds(
    measured: Mapping[int, Measured], others: Mapping[int, Measured] | None = None
) -> dict[str, list[Estimate]]:
    """Every result with its interval over seeds and documents; minus that of ``others``, an arm
    with the same seeds and documents, if given. Both by seed."""
    seeds = list(measured)

    def at(seed: int, weights: np.ndarray) -> dict[str, np.ndarray]:
        own = measured[seed].at(weights)
        if others is None:
            return own
        other = others[seed].at(weights)
        return {name: own[name] - other[name] for name in own if name in other}

    counts = {seed: len(one.records) for seed, one in measured.items()}
    points = [at(seed, np.ones((1, counts[seed]))) for seed in seeds]
    # [draws of a seed][seeds]: a seed that is drawn twice has other documents the second time.
    draws = [
        [at(seed, resample(counts[seed], draw)) for seed in seeds] for draw in range(len(seeds))
    ]
    picked = np.random.default_rng(0).integers(len(seeds), size=(len(seeds), RESAMPLES))
    found = {}
    for name in set.intersection(*map(set, points)):
        values = [
            np.stack([one[name] for one in own])[picked[draw], range(RESAMPLES)]
            for draw, own in enumerate(draws)
        ]
        point = np.mean([one[name][0] for one in points], axis=0)
        found[name] = estimates(point, np.mean(values, axis=0), min(counts.values()))
    return found


def tables_of(
    measured: Mapping[str, Mapping[str, Mapping[int, Measured]]],
    costs: Mapping[str, Sequence[Cost]],
    bases: Mapping[str, Mapping[str, Mapping[str, str]]],
) -> list[dict[str, Any]]:
    """As ``report.py`` takes them: ``title``, ``note``, ``columns`` and ``rows``.

    measured: by held-out file, then by arm, then by seed. costs: by arm, one for each seed.
    bases: by held-out file, then by the title of a table of differences: with which arm each arm is
    compared there, on the seeds that both have.
    """
    found = []
    for file, by_arm in measured.items():
        found.append(_results(file, by_arm))
        found += [_differences(file, by_arm, title, of) for title, of in bases[file].items()]
    return [table for table in found if table["rows"]] + [_costs(costs)]


def _results(file: str, by_arm: Mapping[str, Mapping[int, Measured]]) -> dict[str, Any]:
    found = {arm: (len(own), over_seeds(own)) for arm, own in by_arm.items()}
    return _table(
        f"Held out: {file}",
        "Mean over the seeds, with 95 % intervals over seeds and documents.",
        MEASURES,
        found,
    )


def _differences(
    file: str,
    by_arm: Mapping[str, Mapping[int, Measured]],
    title: str,
    base_of: Mapping[str, str],
) -> dict[str, Any]:
    found = {}
    for arm, base in base_of.items():
        bases = by_arm.get(base, {})
        both = {seed: one for seed, one in by_arm.get(arm, {}).items() if seed in bases}
        if both:
            found[arm] = (len(both), over_seeds(both, bases))
    return _table(
        f"Held out: {file}: {title}",
        "Of the same seeds and documents.",
        [column for column in MEASURES if column.name in COMPARED],
        found,
    )


def _table(
    title: str,
    note: str,
    columns: Sequence[Column],
    found: Mapping[str, tuple[int, Mapping[str, Sequence[Estimate]]]],
) -> dict[str, Any]:
    """``found``: seeds and results by arm. A column that nobody measured is left out."""
    shown = [one for one in columns if any(one.name in own for _, own in found.values())]
    return {
        "title": title,
        "note": note,
        "columns": ["arm", "seeds", *(column.title for column in shown)],
        "rows": [
            [arm, seeds, *(_cell(own, column) for column in shown)]
            for arm, (seeds, own) in found.items()
        ],
    }


def _costs(costs: Mapping[str, Sequence[Cost]]) -> dict[str, Any]:
    # Title, field, scale to what is shown, decimals.
    columns = (
        ("steps", "steps", 1.0, 0),
        ("seconds", "seconds", 1.0, 0),
        ("seconds a step", "step_seconds", 1.0, 2),
        ("tokens trained", "trained", 1.0, 0),
        ("tokens generated", "generated", 1.0, 0),
        ("FLOPs, 1e12", "flops", 1e-12, 1),
    )

    def mean(own: Sequence[Cost], field: str, scale: float, decimals: int) -> float:
        value = scale * statistics.mean(getattr(one, field) for one in own)
        return round(value, decimals or None)

    return {
        "title": "Cost",
        "note": "Mean over the seeds. The first step counts as a median one, because it compiles. "
        "FLOPs: 6 for each weight and token of the update, 2 for those that rollouts read.",
        "columns": ["arm", *(title for title, *_ in columns)],
        "rows": [[arm, *(mean(own, *rest) for _, *rest in columns)] for arm, own in costs.items()],
    }


def _cell(found: Mapping[str, Sequence[Estimate]], column: Column) -> dict[str, Any] | None:
    if column.name not in found:
        return None
    own = found[column.name]
    estimate = own[ALL] if len(own) > 1 else own[0]
    return {
        key: value if value is None else round(column.scale * value, column.decimals)
        for key, value in estimate.as_json().items()
    }


def as_markdown(table: Mapping[str, Any]) -> str:
    """One of ``tables_of`` for people."""

    def text(cell: Any) -> str:
        if isinstance(cell, dict):
            value, low, high = cell.values()
            return f"{value} [{low}, {high}]" if low is not None else f"{value}"
        return "" if cell is None else f"{cell:,}" if isinstance(cell, int) else f"{cell}"

    columns, rows = table["columns"], table["rows"]
    lines = [columns, ["---"] * len(columns), *([text(cell) for cell in row] for row in rows)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {table['title']}\n\n{table['note']}\n\n{body}\n"
