"""What an evaluation measured: records of documents, their statistics, tables and JSON.

Accuracies and rates are ratios of sums over documents, with 95 % intervals by a bootstrap over
documents; two evaluations of the same positions are compared by resampling the same documents.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from json_lines import read_object

SPLITS = ("easy", "medium", "hard")
COLUMNS = (*SPLITS, "average")
RESAMPLES = 2000
FORMAT = 2
NOT_COUNTED = "-"
# How a result is measured: its name, and the title of its row.
METHODS = {
    "next_token": "next token, all positions",
    "next_token_sampled": "next token",
    "thought": "thought, then answer",
    "no_thought": "no thought, then answer",
}
RATES = {
    "thought_length": ("thought, tokens", 1.0),
    "well_formed": ("well-formed answers, %", 100.0),
    "closed_by_itself": ("closed by itself, %", 100.0),
    "no_thought_well_formed": ("well-formed without thought, %", 100.0),
}


@dataclass
class Record:
    """What was measured on one document; the output holds one per line.

    line: of the data file, from 1. id: digest of the whole document's token ids. tokens, dropped:
    read, and left out beyond --seq-length. difficulty, next_token: one character per token that was
    read, about its prediction from the tokens before it: how many thresholds the entropy exceeds
    (0 to 3) or ``NOT_COUNTED``, and 1 where the most likely token is the true one. entropy: in
    nats, summed over the counted tokens. positions: indices of the tokens predicted by reasoning,
    ascending; the lists after it belong to them and sum over the samples of a position.
    """

    line: int
    id: str
    tokens: int
    dropped: int
    difficulty: str
    next_token: str
    entropy: float
    positions: list[int]
    thought: list[int] = field(default_factory=list)
    thought_length: list[int] = field(default_factory=list)
    well_formed: list[int] = field(default_factory=list)
    closed_by_itself: list[int] = field(default_factory=list)
    no_thought: list[int] = field(default_factory=list)
    no_thought_well_formed: list[int] = field(default_factory=list)


def split_counts(records: Sequence[Record], method: str, samples: int) -> tuple[np.ndarray, ...]:
    """Right predictions and predictions of each document, both ``[documents, splits]``."""
    right = np.zeros((len(records), len(SPLITS)))
    total = np.zeros((len(records), len(SPLITS)))
    for row, record in enumerate(records):
        if method == "next_token":
            tokens, each = range(record.tokens), 1
            matches = [int(value == "1") for value in record.next_token]
        else:
            tokens, each = record.positions, samples
            matches = getattr(record, method, None)
            if method == "next_token_sampled":
                each, matches = 1, [int(record.next_token[token]) for token in tokens]
        for token, match in zip(tokens, matches, strict=True):
            if record.difficulty[token] != NOT_COUNTED:
                splits = int(record.difficulty[token])
                right[row, :splits] += match
                total[row, :splits] += each
    return right, total


def resample(documents: int, seed: int) -> np.ndarray:
    """``[RESAMPLES, documents]``: how often each document is drawn in each bootstrap resample."""
    shares = np.full(documents, 1 / documents)
    return np.random.default_rng(seed).multinomial(documents, shares, size=RESAMPLES)


def ratios(weights: np.ndarray, right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Share of right ones by column, ``[resamples, columns]``; NaN where there is none at all."""
    count = weights @ total
    return np.divide(weights @ right, count, out=np.full(count.shape, np.nan), where=count > 0)


def accuracies(weights: np.ndarray, right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """``[resamples, splits + 1]``: accuracy on each split and, last, the mean over the splits."""
    by_split = ratios(weights, right, total)
    return np.concatenate([by_split, by_split.mean(axis=1, keepdims=True)], axis=1)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN where it cannot be had."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """The same, with null for NaN."""
        return {key: None if math.isnan(x) else x for key, x in vars(self).items()}


def estimates(point: np.ndarray, resampled: np.ndarray, documents: int) -> list[Estimate]:
    """One for each column of ``resampled`` ``[resamples, columns]``."""
    found = []
    for value, column in zip(point, resampled.T, strict=True):
        known = column[~np.isnan(column)]
        low = high = math.nan
        if documents > 1 and not math.isnan(value):
            low, high = np.percentile(known, [2.5, 97.5])
        found.append(Estimate(float(value), float(low), float(high)))
    return found


class Measured:
    """All results of one evaluation, as functions of the weights of its documents."""

    def __init__(self, settings: dict[str, Any], records: Sequence[Record]) -> None:
        self.settings = settings
        self.records = records
        self.reasoned = any(record.positions for record in records)
        samples = settings["samples"]
        names = METHODS if self.reasoned else ("next_token",)
        self._counts = {name: split_counts(records, name, samples) for name in names}
        responses = np.array([[len(record.positions) * samples] for record in records])
        self._rates = {
            name: (np.array([[sum(getattr(record, name))] for record in records]), responses)
            for name in RATES
            if self.reasoned
        }

    def at(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Accuracies ``[resamples, splits + 1]`` and rates ``[resamples, 1]`` by name."""
        values = {name: accuracies(weights, *counts) for name, counts in self._counts.items()}
        if self.reasoned:
            values["thought_minus_no_thought"] = values["thought"] - values["no_thought"]
        return values | {name: ratios(weights, *counts) for name, counts in self._rates.items()}

    def positions(self, method: str) -> list[int]:
        """How many positions each split has."""
        each = 1 if method.startswith("next_token") else self.settings["samples"]
        return [int(count) // each for count in self._counts[method][1].sum(axis=0)]

    def estimates(self) -> dict[str, list[Estimate]]:
        """Every result with its interval."""
        count = len(self.records)
        point = self.at(np.ones((1, count)))
        resampled = self.at(resample(count, self.settings["seed"]))
        return {name: estimates(point[name][0], resampled[name], count) for name in point}


def differences(before: Measured, after: Measured) -> dict[str, list[Estimate]]:
    """``after - before``, both resampled by the same documents (a paired bootstrap)."""
    count = len(before.records)
    weights = resample(count, before.settings["seed"])
    point = [measured.at(np.ones((1, count))) for measured in (before, after)]
    drawn = [measured.at(weights) for measured in (before, after)]
    return {
        name: estimates(
            (point[1][name] - point[0][name])[0], drawn[1][name] - drawn[0][name], count
        )
        for name in point[0]
        if name in point[1]
    }


def shown(estimate: Estimate, scale: float = 100.0, sign: bool = False) -> str:
    """``50.5 [47.9, 53.1]``."""
    form = "+.1f" if sign else ".1f"
    if math.isnan(estimate.value):
        return "none"
    text = format(scale * estimate.value, form)
    if math.isnan(estimate.low):
        return text
    return f"{text} [{scale * estimate.low:{form}}, {scale * estimate.high:{form}}]"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    columns = max(map(len, rows))
    filled = [[*row, *[""] * (columns - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in filled) for column in range(columns)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in filled
    )


def split_titles(settings: dict[str, Any]) -> list[str]:
    """``easy, H > 0.5`` and so on."""
    thresholds = settings["entropy_thresholds"]
    return [f"{name}, H > {low:g}" for name, low in zip(SPLITS, thresholds, strict=True)]


def summary(measured: Measured) -> str:
    """The table of one evaluation."""
    settings, results = measured.settings, measured.estimates()
    rows = [["accuracy, %", *split_titles(settings), "average"]]

    def add(title: str, name: str, sign: bool = False) -> None:
        rows.append([title, *(shown(estimate, sign=sign) for estimate in results[name])])

    def add_counts(name: str) -> None:
        rows.append(["  positions", *(f"{count:,}" for count in measured.positions(name))])

    add(METHODS["next_token"], "next_token")
    add_counts("next_token")
    if not measured.reasoned:
        return aligned(rows)
    rows.append([""])
    for name in ("next_token_sampled", "thought", "no_thought"):
        add(METHODS[name], name)
    add("thought minus no thought", "thought_minus_no_thought", sign=True)
    add_counts("thought")
    rates = [[title, shown(results[name][0], scale)] for name, (title, scale) in RATES.items()]
    return aligned(rows) + "\n\n" + aligned(rates)


def comparison(names: Sequence[str], measured: Sequence[Measured]) -> str:
    """The table of several evaluations, each with its difference from the first."""
    results = [one.estimates() for one in measured]
    changes = [differences(measured[0], one) for one in measured[1:]]
    rows = [["", names[0]]]
    for name in names[1:]:
        rows[0] += [name, "difference"]

    def add(title: str, name: str, column: int, scale: float) -> None:
        if not all(name in result for result in results):
            return
        row = [title, shown(results[0][name][column], scale)]
        for result, change in zip(results[1:], changes, strict=True):
            row.append(shown(result[name][column], scale))
            row.append(shown(change[name][column], scale, sign=True))
        rows.append(row)

    titles = [*split_titles(measured[0].settings), "average"]
    for name, title in METHODS.items():
        if all(name in result for result in results):
            # "next token" alone would not tell which positions.
            drawn = name == "next_token_sampled"
            rows += [[""], [f"{title}{', sampled positions' if drawn else ''}, accuracy in %"]]
        for column, split in enumerate(titles):
            add(f"  {split}", name, column, 100.0)
    rows.append([""])
    for name, (title, scale) in RATES.items():
        add(title, name, 0, scale)
    return aligned(rows)


def write_output(path: Path, measured: Measured, seconds: float) -> None:
    """Settings and results, then one line for each document."""
    records = measured.records
    results = {
        name: {c: e.as_json() for c, e in zip(COLUMNS, found, strict=True)}
        if len(found) > 1
        else found[0].as_json()
        for name, found in measured.estimates().items()
    }
    for method in measured._counts:
        counts = dict(zip(SPLITS, measured.positions(method), strict=True))
        for split, count in counts.items():
            results[method][split]["positions"] = count
    counted = sum(len(r.difficulty) - r.difficulty.count(NOT_COUNTED) for r in records)
    head = {
        "format": FORMAT,
        "settings": measured.settings,
        "counts": {
            "documents": len(records),
            "tokens": sum(record.tokens for record in records),
            "dropped_tokens": sum(record.dropped for record in records),
            "predicted_tokens": counted,
        },
        "entropy": sum(record.entropy for record in records) / max(counted, 1),
        "results": results,
        "seconds": round(seconds, 1),
    }
    lines = ",\n".join("    " + json.dumps(vars(record)) for record in records)
    text = (
        json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "documents": [\n{lines}\n  ]\n}}\n'
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.rename(path)


def read_output(path: Path) -> Measured:
    """An earlier output.

    Raises:
        ValueError: it is missing or no output of this tool.
    """
    content = read_object(path)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, not {FORMAT}; evaluate again")
        prompt = content["settings"]["prompt"]
        if not all(isinstance(prompt[piece], str) for piece in ("head", "stem", "close", "digest")):
            raise ValueError("its prompt is no text")
        _check_settings(content["settings"])
        records = [_record(values) for values in content["documents"]]
        if not records:
            raise ValueError("it holds no document")
        return Measured(content["settings"], records)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is not an output of evaluate.py ({error!r}).") from None


def _check_settings(settings: dict[str, Any]) -> None:
    """What results are computed with.

    Raises:
        ValueError: a setting is none that evaluate.py writes.
    """
    for name, least in {"samples": 1, "seed": 0}.items():
        if type(settings[name]) is not int or settings[name] < least:
            raise ValueError(f"its {name} is no whole number from {least}")
    thresholds = settings["entropy_thresholds"]
    if len(thresholds) != len(SPLITS) or not all(map(_is_number, thresholds)):
        raise ValueError(f"its entropy_thresholds are not {len(SPLITS)} numbers")


def _record(values: dict[str, Any]) -> Record:
    """One document of an output.

    Raises:
        TypeError, ValueError: it is none.
    """
    record = Record(**values)
    for one in fields(Record):
        value = getattr(record, one.name)
        if one.type == list[int]:
            fits = isinstance(value, list) and all(type(part) is int for part in value)
        else:
            fits = _is_number(value) if one.type is float else type(value) is one.type
        if not fits:
            raise ValueError(f"{one.name} of a document is no {one.type}")
    if not len(record.difficulty) == len(record.next_token) == record.tokens:
        raise ValueError("difficulty, next_token and tokens of a document differ in length")
    if any(not 0 < position < record.tokens for position in record.positions):
        raise ValueError("a position lies outside its document")
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_same_positions(paths: Sequence[Path], measured: Sequence[Measured]) -> None:
    """All evaluations are of the same positions, in the same splits.

    Raises:
        ValueError: they are not.
    """

    def positions(one: Measured) -> list[tuple[Any, ...]]:
        return [(r.line, r.id, r.difficulty, r.positions) for r in one.records]

    for path, other in zip(paths[1:], measured[1:], strict=True):
        if positions(other) != positions(measured[0]):
            raise ValueError(
                f"{paths[0]} and {path} were not measured on the same positions; evaluate again "
                f"with --positions-from {paths[0]}."
            )


def check_same_prompt(
    path: Path, prompt: Mapping[str, str], other: str | Path, other_prompt: Mapping[str, str]
) -> None:
    """The evaluation in ``path`` asked with the same prompt as another.

    Raises:
        ValueError: one sentence that names the piece of the prompt that differs, with both texts.
    """
    for piece in ("head", "stem", "close"):
        if prompt[piece] != other_prompt[piece]:
            here, there = _where_they_part(prompt[piece], other_prompt[piece])
            raise ValueError(
                f"{path} and {other} differ in the {piece} of the prompt: {here!r} and {there!r}; "
                "evaluate both with the same --rmt-template, --rmt-no-chat, tokenizer and chat "
                "template (which may write the date: then on the same day)."
            )
    if prompt["digest"] != other_prompt["digest"]:
        raise ValueError(
            f"{path} and {other} have the same prompt in other tokens; evaluate both with the same "
            "tokenizer and the same version of transformers."
        )


def _where_they_part(one: str, other: str, around: int = 24) -> tuple[str, str]:
    """Both texts, cut to where they begin to differ."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    same = len(list(pairs))
    first = max(0, same - around)
    return tuple(
        ("..." if first else "") + text[first : same + around] + "..." * (same + around < len(text))
        for text in (one, other)
    )


def compare(paths: Sequence[Path]) -> str:
    """The table of ``--compare``.

    Raises:
        ValueError: a file cannot be used, or they are not of the same positions and prompt.
    """
    if len(paths) < 2:
        raise ValueError("--compare got one file; name two or more.")
    measured = [read_output(path) for path in paths]
    check_same_positions(paths, measured)
    for path, one in zip(paths[1:], measured[1:], strict=True):
        check_same_prompt(paths[0], measured[0].settings["prompt"], path, one.settings["prompt"])
    names = [path.stem for path in paths]
    return comparison(names if len(set(names)) == len(names) else list(map(str, paths)), measured)
