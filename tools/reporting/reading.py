"""What a report is made of, read from files that may still be written, be cut off, or be missing.

A run is a folder with any of ``rmt_metrics.jsonl``, ``rmt_samples.jsonl`` and ``rmt_texts.jsonl``
(``megatron_rmt.job.metrics`` and ``.samples`` write them; older ones have fewer keys). Files are
opened for reading only. A last line without its end is being written and does not count; other
lines that cannot be read are left out and counted (``Run.problems``). A run that was resumed
repeats iterations: from there on only its later lines count.
"""

import contextlib
import json
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS, SAMPLES, TEXTS = "rmt_metrics.jsonl", "rmt_samples.jsonl", "rmt_texts.jsonl"
LARGEST_SHOWN = 1e100
LONGEST_LINE = 2**26
# Steps of which rollouts are kept, beside the first; those that a page shows are fewer.
KEPT_STEPS = 16


@dataclass(frozen=True)
class Rollout:
    """One line of the samples file; None where it is not said. See ``samples.ShownRollout``."""

    context: str
    truth: str
    thought: str
    prediction: str
    reward: float | None
    advantage: float | None
    right: bool | None
    sample: int | None
    token: int | None
    number: int | None
    entropy: float | None
    tokens: list[str]
    log_probs: list[float | None]


@dataclass(frozen=True)
class Text:
    """One line of the texts file. See ``samples.ShownText``."""

    iteration: int
    sample: int | None
    tokens: list[str]
    entropies: list[float | None]
    tiers: list[str | None]
    chosen: frozenset[int]


@dataclass
class Run:
    """One run, as far as its files tell.

    metrics: by name, a number for each of ``metrics["iteration"]``, NaN where there is none.
    rollouts: by iteration, in the order of the file. texts: by iteration. problems: sentences about
    what could not be read.
    """

    name: str
    metrics: dict[str, array] = field(default_factory=dict)
    rollouts: dict[int, list[Rollout]] = field(default_factory=dict)
    texts: dict[int, Text] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def iterations(self) -> Sequence[float]:
        """Those that have metrics, ascending; 0 is what was measured before the first step."""
        return self.metrics.get("iteration", array("d"))

    def known(self, name: str) -> list[tuple[float, float]]:
        """(iteration, value) where the metric has one."""
        values = self.metrics.get(name, array("d"))
        return [
            (at, value)
            for at, value in zip(self.iterations, values, strict=False)
            if not math.isnan(value)
        ]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Evaluation:
    """An output of ``evaluate.py``. results: by name and column; rates have the column ""."""

    name: str
    settings: dict[str, Any]
    documents: int
    results: dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class Table:
    """A table of a study. cells: text, a number, an estimate or None."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str | float | Estimate | None]]


@dataclass(frozen=True)
class Inputs:
    """All that a page is made of."""

    runs: list[Run]
    evaluations: list[Evaluation]
    tables: list[Table]


def read_inputs(words: Sequence[str], *, waits: bool = False) -> Inputs:
    """What the ``words`` of the command line name, each a path or NAME=PATH.

    waits: a run's folder may be empty still.

    Raises:
        ValueError: one sentence; a path is none of a run, an evaluation or a study.
    """
    found = Inputs([], [], [])
    named = [_name_and_path(word) for word in words]
    names = [name or _own_name(path) for name, path in named]
    for (name, path), own in zip(named, names, strict=True):
        shown = own if name or names.count(own) == 1 else str(path)
        if path.is_dir() or path.suffix != ".json":
            found.runs.append(_read_run(shown, path, waits))
        else:
            _read_json(shown, path, found)
    return found


def files_of(words: Sequence[str]) -> list[Path]:
    """The files that ``read_inputs`` looks at, whether they are there or not."""
    paths = [_name_and_path(word)[1] for word in words]
    return [file for path in paths for file in (_run_files(path) if _is_run(path) else [path])]


def _is_run(path: Path) -> bool:
    return path.is_dir() or path.suffix != ".json"


def _name_and_path(word: str) -> tuple[str, Path]:
    name, equals, path = word.partition("=")
    if equals and path and not Path(word).exists():
        return name, Path(path)
    return "", Path(word)


def _own_name(path: Path) -> str:
    if path.suffix == ".json":
        return path.stem
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    # Folders of checkpoints are called alike.
    return folder.parent.name if folder.name in ("checkpoint", "checkpoints") else folder.name


def _run_files(path: Path) -> list[Path]:
    if path.is_dir():
        return [path / name for name in (METRICS, SAMPLES, TEXTS)]
    metrics = path.with_name(METRICS) if path.name in (SAMPLES, TEXTS) else path
    return [metrics, path.with_name(SAMPLES), path.with_name(TEXTS)]


def _read_run(name: str, path: Path, waits: bool) -> Run:
    files = _run_files(path)
    if not any(file.is_file() for file in files) and not (waits and path.is_dir()):
        if not path.exists():
            raise ValueError(f"{path} cannot be read: there is no such file or folder.")
        raise ValueError(
            f"{path} holds none of {METRICS}, {SAMPLES} and {TEXTS}; name the --save folder of a "
            "run, its metrics file, or JSON of an evaluation or a study (.json)."
        )
    run = Run(name)
    for file, take in zip(files, (_take_metrics, _take_rollout, _take_text), strict=True):
        if file.is_file():
            _take_all(run, file, take)
    for kept in (run.rollouts, run.texts):
        _forget(kept)
    return run


def _take_all(run: Run, file: Path, take: Any) -> None:
    """Give each row of ``file`` to ``take``, which says whether it is one.

    Raises:
        ValueError: the file cannot be read, or has lines, of which none is a row.
    """
    taken, broken = 0, []
    try:
        for number, row in _rows(file):
            if row is not None and take(run, row):
                taken += 1
            else:
                broken.append(number)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}.") from None
    if broken and not taken:
        raise ValueError(
            f"{file}:{broken[0]}: not a line that a run of RMT wrote, nor is any other; name the "
            "--save folder of a run, its metrics file, or JSON of an evaluation or a study (.json)."
        )
    if broken:
        which = "line" if len(broken) == 1 else f"{len(broken)} lines, the first of them"
        run.problems.append(f"{file.name}: left out {which} {broken[0]}, which cannot be read.")


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and object of each line, None where there is none."""
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE):
            number += 1
            row = _parsed(line)
            if row is None and not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                return
            if line.strip():
                yield number, row


def _parsed(text: bytes) -> dict[str, Any] | None:
    """The object that a JSON text is, else None."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return None


def _take_metrics(run: Run, row: dict[str, Any]) -> bool:
    iteration = _whole(row.get("iteration"))
    if iteration is None or iteration < 0:
        return False
    steps = run.metrics.setdefault("iteration", array("d"))
    kept = len(steps)
    while kept and steps[kept - 1] >= iteration:
        kept -= 1
    for name in {*run.metrics, *row}:
        column = run.metrics.setdefault(name, array("d"))
        del column[kept:]
        column.extend([math.nan] * (kept - len(column)))
        column.append(number(row.get(name)))
    return True


def _take_rollout(run: Run, row: dict[str, Any]) -> bool:
    iteration = _whole(row.get("iteration"))
    if iteration is None or not isinstance(row.get("thought"), str):
        return False
    right = row.get("right")
    tokens, log_probs = _texts(row.get("tokens")), _numbers(row.get("log_probs"))
    if len(tokens) != len(log_probs):
        tokens, log_probs = [], []
    rollout = Rollout(
        *(_text(row.get(name)) for name in ("context", "truth", "thought", "prediction")),
        reward=_known(row.get("reward")),
        advantage=_known(row.get("advantage")),
        right=right if isinstance(right, bool) else None,
        sample=_whole(row.get("sample")),
        token=_whole(row.get("token")),
        number=_whole(row.get("rollout")),
        entropy=_known(row.get("entropy")),
        tokens=tokens,
        log_probs=log_probs,
    )
    _go_back(run.rollouts, iteration)
    own = run.rollouts.setdefault(iteration, [])
    place = (rollout.sample, rollout.token, rollout.number)
    # The step was taken again, which wrote the same.
    if None not in place:
        own[:] = [one for one in own if (one.sample, one.token, one.number) != place]
    own.append(rollout)
    if len(run.rollouts) > 2 * KEPT_STEPS:
        _forget(run.rollouts)
    return True


def _take_text(run: Run, row: dict[str, Any]) -> bool:
    iteration, tokens = _whole(row.get("iteration")), _texts(row.get("tokens"))
    entropies, tiers, chosen = (row.get(name) for name in ("entropies", "tiers", "chosen"))
    if iteration is None or not tokens or len(_numbers(entropies)) != len(tokens):
        return False
    if not isinstance(tiers, list) or len(tiers) != len(tokens):
        tiers = [None] * len(tokens)
    _go_back(run.texts, iteration)
    run.texts[iteration] = Text(
        iteration=iteration,
        sample=_whole(row.get("sample")),
        tokens=tokens,
        entropies=_numbers(entropies),
        tiers=[tier if isinstance(tier, str) else None for tier in tiers],
        chosen=frozenset(at for at in map(_whole, chosen) if at is not None)
        if isinstance(chosen, list)
        else frozenset(),
    )
    if len(run.texts) > 2 * KEPT_STEPS:
        _forget(run.texts)
    return True


def _go_back(kept: dict[int, Any], iteration: int) -> None:
    for later in [one for one in kept if one > iteration]:
        del kept[later]


def _forget(kept: dict[int, Any]) -> None:
    """All but the first and the last steps."""
    for one in sorted(kept)[1:-KEPT_STEPS]:
        del kept[one]


def _read_json(name: str, path: Path, found: Inputs) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    values = _parsed(content)
    if values is None:
        raise ValueError(
            f"{path} is not one JSON object; name an output of evaluate.py, or a study's tables."
        )
    if isinstance(values.get("tables"), list):
        found.tables.extend(_table(path, table) for table in values["tables"])
    elif isinstance(values.get("results"), dict):
        found.evaluations.append(_evaluation(name, values))
    else:
        raise ValueError(
            f'{path} has neither "results", as outputs of evaluate.py, nor "tables", as a study '
            "has; name one of these."
        )


def _evaluation(name: str, values: dict[str, Any]) -> Evaluation:
    settings, counts = values.get("settings"), values.get("counts")
    results: dict[str, dict[str, Estimate]] = {}
    for result, own in values["results"].items():
        columns = own if isinstance(own, dict) else {}
        one = estimate(columns)
        if one is not None:
            results[result] = {"": one}
            continue
        read = {column: estimate(value) for column, value in columns.items()}
        results[result] = {column: value for column, value in read.items() if value is not None}
    return Evaluation(
        name=name,
        settings=settings if isinstance(settings, dict) else {},
        documents=_whole(counts.get("documents")) or 0 if isinstance(counts, dict) else 0,
        results=results,
    )


def _table(path: Path, table: Any) -> Table:
    columns = table.get("columns") if isinstance(table, dict) else None
    rows = table.get("rows") if isinstance(table, dict) else None
    if (
        not isinstance(columns, list)
        or not isinstance(rows, list)
        or not all(isinstance(row, list) for row in rows)
    ):
        raise ValueError(
            f'{path}: each of its tables must have "columns", a list, and "rows", a list of lists.'
        )
    return Table(
        title=_text(table.get("title")),
        note=_text(table.get("note")),
        columns=[_text(column) for column in columns],
        rows=[[_cell(cell) for cell in row] for row in rows],
    )


def _cell(cell: Any) -> str | float | Estimate | None:
    if isinstance(cell, dict):
        return estimate(cell)
    return cell if cell is None or isinstance(cell, str) else _known(cell)


def estimate(value: Any) -> Estimate | None:
    """What ``{"value": ..., "low": ..., "high": ...}`` says; None where it has no value."""
    if not isinstance(value, dict) or math.isnan(number(value.get("value"))):
        return None
    return Estimate(*(number(value.get(key)) for key in ("value", "low", "high")))


def number(value: Any) -> float:
    """``value`` if it is a number that an axis can show, else NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < LARGEST_SHOWN else math.nan


def _known(value: Any) -> float | None:
    found = number(value)
    return None if math.isnan(found) else found


def _whole(value: Any) -> int | None:
    found = number(value)
    return int(found) if found == found // 1 and abs(found) < 2**53 else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _texts(values: Any) -> list[str]:
    return [_text(value) for value in values] if isinstance(values, list) else []


def _numbers(values: Any) -> list[float | None]:
    return [_known(value) for value in values] if isinstance(values, list) else []
