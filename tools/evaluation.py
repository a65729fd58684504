"""What an evaluation measured: records of documents, their statistics, tables and JSON.

Accuracies, log-probs and rates are ratios of sums over documents, with 95 % intervals by a
bootstrap over documents; two evaluations of the same positions are compared by resampling the same
documents.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from json_lines import read_object

SPLITS = ("easy", "medium", "hard")
COLUMNS = (*SPLITS, "average", "all")
RESAMPLES = 2000
FORMAT = 3
NOT_COUNTED = "-"
# Of the plain text: exp of the mean negative log p of a counted token.
PERPLEXITY = "perplexity"
# Every position of the documents, not the drawn ones alone.
EVERYWHERE = "next_token"
# The ways in which drawn positions are predicted; differences are the second minus the others.
WAYS = ("next token", "thought", "swapped thought", "no thought")


class Block(NamedTuple):
    """What is measured in all ``WAYS``.

    title: of the block. names: of the results. rows: their titles. scale, decimals: as shown.
    """

    title: str
    names: tuple[str, str, str, str]
    rows: tuple[str, str, str, str]
    scale: float = 100.0
    decimals: int = 1

    @property
    def differences(self) -> dict[str, tuple[str, str, str]]:
        """By name: the row's title, and the names of the results that are subtracted."""
        plain, thought, *others = self.names
        return {
            f"{thought}_minus_{name}": (f"{WAYS[1]} minus {way}", thought, name)
            for name, way in zip((plain, *others), (WAYS[0], *WAYS[2:]), strict=True)
        }


BLOCKS = (
    Block(
        "answers drawn as in training, %",
        ("next_token_sampled", "thought", "swapped", "no_thought"),
        (WAYS[0], *(f"{way}, then answer" for way in WAYS[1:])),
    ),
    Block(
        "most likely next token, %",
        (
            "next_token_sampled",
            "thought_likeliest",
            "swapped_likeliest",
            "no_thought_likeliest",
        ),
        (WAYS[0], *(f"{way}, then next token" for way in WAYS[1:])),
    ),
    Block(
        "log p of the truth, nats",
        ("log_prob", "thought_log_prob", "swapped_log_prob", "no_thought_log_prob"),
        (WAYS[0], *(f"{way}, then the truth" for way in WAYS[1:])),
        scale=1.0,
        decimals=3,
    ),
)
# What is measured once at a position, not for each response.
ONCE = (EVERYWHERE, "next_token_sampled", "log_prob", "no_thought_likeliest", "no_thought_log_prob")
RATES = {
    "thought_length": ("thought, tokens", 1.0),
    "well_formed": ("well-formed answers, %", 100.0),
    "closed_by_itself": ("closed by itself, %", 100.0),
    "no_thought_well_formed": ("well-formed without thought, %", 100.0),
    "whole_answer": ("whole answers, %", 100.0),
    "no_thought_whole_answer": ("whole answers without thought, %", 100.0),
}
# What has one value, not one for each split: title, scale and decimals.
SINGLE: dict[str, tuple[str, float, int]] = {
    PERPLEXITY: ("perplexity of the plain text", 1.0, 3),
    **{name: (title, scale, 1) for name, (title, scale) in RATES.items()},
}


@dataclass
class Record:
    """What was measured on one document; the output holds one per line.

    file: the name of its file. line: of the file, from 1. id: digest of the whole document's
    token ids. tokens, dropped: read, and left out beyond --seq-length. difficulty, next_token:
    one character per token that was read, about its prediction from the tokens before it: how
    many thresholds the entropy exceeds (0 to 3) or ``NOT_COUNTED``, and 1 where the most likely
    token is the true one. entropy: in nats, summed over the counted tokens. text_log_prob: log
    p of the true tokens, likewise; None in older outputs. positions: indices of the tokens
    predicted by reasoning, ascending; the lists after it belong to them and sum over the
    samples of a position, but for those of ``ONCE``. What is not measured is empty. thought,
    swapped, no_thought: right answers. ...whole_answer: those that say the answer that the text
    marks, and no more. ..._likeliest: the true token is the most likely one. ..._log_prob:
    nats, mean over the true tokens.
    """

    file: str
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
    swapped: list[int] = field(default_factory=list)
    thought_likeliest: list[int] = field(default_factory=list)
    swapped_likeliest: list[int] = field(default_factory=list)
    no_thought_likeliest: list[int] = field(default_factory=list)
    log_prob: list[float] = field(default_factory=list)
    thought_log_prob: list[float] = field(default_factory=list)
    swapped_log_prob: list[float] = field(default_factory=list)
    no_thought_log_prob: list[float] = field(default_factory=list)
    whole_answer: list[int] = field(default_factory=list)
    no_thought_whole_answer: list[int] = field(default_factory=list)
    text_log_prob: float | None = None

    def values(self, name: str) -> tuple[Sequence[int], Sequence[float]]:
        """(the tokens at which the result ``name`` was measured, what came out)."""
        if name == EVERYWHERE:
            return range(self.tokens), [int(match == "1") for match in self.next_token]
        if name == "next_token_sampled":
            return self.positions, [int(self.next_token[token]) for token in self.positions]
        return self.positions, getattr(self, name)


def split_counts(records: Sequence[Record], name: str, samples: int) -> tuple[np.ndarray, ...]:
    """Sums and counts of a result in each document, both ``[documents, splits + 1]``; the last
    column is of all positions, whatever their entropy."""
    total = np.zeros((len(records), len(SPLITS) + 1))
    count = np.zeros_like(total)
    each = 1 if name in ONCE else samples
    for row, record in enumerate(records):
        for token, value in zip(*record.values(name), strict=True):
            if record.difficulty[token] != NOT_COUNTED:
                splits = [*range(int(record.difficulty[token])), len(SPLITS)]
                total[row, splits] += value
                count[row, splits] += each
    return total, count


def resample(documents: int, seed: int) -> np.ndarray:
    """``[RESAMPLES, documents]``: how often each document is drawn in each bootstrap resample."""
    shares = np.full(documents, 1 / documents)
    return np.random.default_rng(seed).multinomial(documents, shares, size=RESAMPLES)


def ratios(weights: np.ndarray, total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Mean by column, ``[resamples, columns]``; NaN where there is nothing at all."""
    count = weights @ count
    return np.divide(weights @ total, count, out=np.full(count.shape, np.nan), where=count > 0)


def means(weights: np.ndarray, total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """``[resamples, splits + 2]``: the mean in each split, that of the three, and that of all
    positions."""
    found = ratios(weights, total, count)
    average = found[:, : len(SPLITS)].mean(axis=1, keepdims=True)
    return np.concatenate([found[:, : len(SPLITS)], average, found[:, len(SPLITS) :]], axis=1)


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
        samples = settings["samples"]

        def is_measured(name: str) -> bool:
            return name == EVERYWHERE or any(len(record.values(name)[1]) for record in records)

        names = [EVERYWHERE, *dict.fromkeys(name for block in BLOCKS for name in block.names)]
        self._counts = {
            name: split_counts(records, name, samples) for name in filter(is_measured, names)
        }
        responses = np.array([[len(record.positions) * samples] for record in records])
        self._rates = {
            name: (np.array([[sum(getattr(record, name))] for record in records]), responses)
            for name in filter(is_measured, RATES)
        }
        log_probs = [[record.text_log_prob] for record in records]
        counted = [[len(r.difficulty) - r.difficulty.count(NOT_COUNTED)] for r in records]
        self._text = (np.array(log_probs), np.array(counted)) if [None] not in log_probs else None

    def parts(self) -> dict[str, "Measured"]:
        """Each file by itself, by name; nothing where there is one alone."""
        names = dict.fromkeys(record.file for record in self.records)
        if len(names) == 1:
            return {}
        return {
            name: Measured(self.settings, [own for own in self.records if own.file == name])
            for name in names
        }

    def at(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Means ``[resamples, splits + 2]``, rates and perplexity ``[resamples, 1]`` by name."""
        values = {name: means(weights, *counts) for name, counts in self._counts.items()}
        differences = {name: own for block in BLOCKS for name, own in block.differences.items()}
        for name, (_, more, less) in differences.items():
            if more in values and less in values:
                values[name] = values[more] - values[less]
        if self._text is not None:
            values[PERPLEXITY] = np.exp(-ratios(weights, *self._text))
        return values | {name: ratios(weights, *counts) for name, counts in self._rates.items()}

    def positions(self, name: str) -> dict[str, int]:
        """How many positions each split has, and all."""
        each = 1 if name in ONCE else self.settings["samples"]
        counts = self._counts[name][1].sum(axis=0)
        return {c: int(n) // each for c, n in zip((*SPLITS, "all"), counts, strict=True)}

    def estimates(self) -> dict[str, list[Estimate]]:
        """Every result with its interval."""
        count = len(self.records)
        point = self.at(np.ones((1, count)))
        resampled = self.at(resample(count, self.settings["seed"]))
        return {name: estimates(point[name][0], resampled[name], count) for name in point}

    def results(self) -> dict[str, Any]:
        """Every result as the output has it."""
        found = {
            name: {c: e.as_json() for c, e in zip(COLUMNS, own, strict=True)}
            if len(own) > 1
            else own[0].as_json()
            for name, own in self.estimates().items()
        }
        for name in self._counts:
            for split, count in self.positions(name).items():
                found[name][split]["positions"] = count
        return found


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


def shown(
    estimate: Estimate, scale: float = 100.0, decimals: int = 1, *, sign: bool = False
) -> str:
    """``50.5 [47.9, 53.1]``."""
    form = f"{'+' if sign else ''}.{decimals}f"
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
    """The table of one evaluation; of several files, one of each and, last, of all."""
    parts = measured.parts()
    if not parts:
        return _summary(measured)
    tables = {**parts, "total": measured}
    return "\n\n\n".join(f"== {name} ==\n\n{_summary(one)}" for name, one in tables.items())


def _summary(measured: Measured) -> str:
    results = measured.estimates()
    rows = [["accuracy, %", *split_titles(measured.settings), "average", "all"]]

    def add(title: str, name: str, *form: float, sign: bool = False) -> None:
        if name in results:
            rows.append([title, *(shown(own, *form, sign=sign) for own in results[name])])

    def add_counts(name: str) -> None:
        counts = measured.positions(name)
        shown_counts = [f"{counts[c]:,}" if c in counts else "" for c in COLUMNS]
        rows.append(["  positions", *shown_counts])

    add("next token, all positions", EVERYWHERE)
    add_counts(EVERYWHERE)
    for block in BLOCKS:
        if block.names[1] not in results:
            continue
        form = block.scale, block.decimals
        rows += [[""], [block.title]]
        for title, name in zip(block.rows, block.names, strict=True):
            add(title, name, *form)
        for name, (title, _, _) in block.differences.items():
            add(title, name, *form, sign=True)
        add_counts(block.names[0])
    rates = [
        [title, shown(results[name][0], *form)]
        for name, (title, *form) in SINGLE.items()
        if name in results
    ]
    return aligned(rows) + ("\n\n" + aligned(rates) if rates else "")


def comparison(names: Sequence[str], measured: Sequence[Measured]) -> str:
    """The table of several evaluations, each with its difference from the first; of several files,
    one of each and, last, of all."""
    parts = [one.parts() for one in measured]
    if not parts[0]:
        return _comparison(names, measured)
    tables = {file: [part[file] for part in parts] for file in parts[0]} | {"total": measured}
    return "\n\n\n".join(
        f"== {file} ==\n\n{_comparison(names, own)}" for file, own in tables.items()
    )


def _comparison(names: Sequence[str], measured: Sequence[Measured]) -> str:
    results = [one.estimates() for one in measured]
    changes = [differences(measured[0], one) for one in measured[1:]]
    rows = [["", names[0]]]
    for name in names[1:]:
        rows[0] += [name, "difference"]

    def add(title: str, name: str, column: int, *form: float, sign: bool = False) -> None:
        row = [title, shown(results[0][name][column], *form, sign=sign)]
        for result, change in zip(results[1:], changes, strict=True):
            row.append(shown(result[name][column], *form, sign=sign))
            row.append(shown(change[name][column], *form, sign=True))
        rows.append(row)

    titles = [*split_titles(measured[0].settings), "average", "all"]

    def add_splits(title: str, name: str, *form: float, sign: bool = False) -> None:
        if all(name in result for result in results):
            rows.extend([[""], [title]])
            for column, split in enumerate(titles):
                add(f"  {split}", name, column, *form, sign=sign)

    add_splits("next token, all positions, accuracy in %", EVERYWHERE)
    # The plain next token is in two of them.
    listed = set()
    for block in BLOCKS:
        form, unit = (block.scale, block.decimals), block.title.split(", ")[-1]
        what = "accuracy" if unit == "%" else "log p"
        for title, name in zip(block.rows, block.names, strict=True):
            # "next token" alone would not tell which positions.
            where = ", sampled positions" if title == WAYS[0] else ""
            if name not in listed:
                add_splits(f"{title}{where}, {what} in {unit}", name, *form)
            listed.add(name)
        for name, (title, _, _) in block.differences.items():
            add_splits(f"{title}: {block.title}", name, *form, sign=True)
    rows.append([""])
    for name, (title, *form) in SINGLE.items():
        if all(name in result for result in results):
            add(title, name, 0, *form)
    return aligned(rows)


def write_output(path: Path, measured: Measured, seconds: float) -> None:
    """Settings and results, then one line for each document."""
    records = measured.records
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
        "results": measured.results(),
        "results_by_file": {name: own.results() for name, own in measured.parts().items()},
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
        elif one.type == list[float]:
            fits = isinstance(value, list) and all(map(_is_number, value))
        elif one.type == float | None:
            fits = value is None or _is_number(value)
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
        return [(r.file, r.line, r.id, r.difficulty, r.positions) for r in one.records]

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
