"""Tables: those of a study as they are, and all numbers of the evaluations."""

import math
from collections.abc import Mapping, Sequence

from reporting.intervals import interval_rows
from reporting.markup import Markup, tag
from reporting.reading import Estimate, Evaluation, Table

COLUMNS = ("easy", "medium", "hard", "average", "all")
# By name of a result: its title, the scale to what is shown, the decimals.
RESULTS: dict[str, tuple[str, float, int]] = {
    "next_token": ("next token, all positions, %", 100.0, 1),
    "next_token_sampled": ("next token at the sampled positions, %", 100.0, 1),
    "thought": ("thought, then answer, %", 100.0, 1),
    "no_thought": ("empty thought, then answer, %", 100.0, 1),
    "swapped": ("another position's thought, then answer, %", 100.0, 1),
    "thought_minus_next_token_sampled": ("thought minus next token, points", 100.0, 1),
    "thought_minus_no_thought": ("thought minus empty thought, points", 100.0, 1),
    "thought_minus_swapped": ("thought minus another position's, points", 100.0, 1),
    "thought_likeliest": ("thought, then likeliest token, %", 100.0, 1),
    "no_thought_likeliest": ("empty thought, then likeliest token, %", 100.0, 1),
    "swapped_likeliest": ("another position's thought, then likeliest token, %", 100.0, 1),
    "log_prob": ("log p of the truth at once, nats", 1.0, 3),
    "thought_log_prob": ("log p of the truth after the thought, nats", 1.0, 3),
    "no_thought_log_prob": ("log p of the truth after an empty thought, nats", 1.0, 3),
    "swapped_log_prob": ("log p of the truth after another's thought, nats", 1.0, 3),
}
RATES: dict[str, tuple[str, float, int]] = {
    "perplexity": ("perplexity of the plain text", 1.0, 3),
    "thought_length": ("tokens of a thought", 1.0, 1),
    "well_formed": ("well-formed answers, %", 100.0, 1),
    "closed_by_itself": ("thoughts closed by the model, %", 100.0, 1),
    "whole_answer": ("whole answers, %", 100.0, 1),
    "no_thought_whole_answer": ("whole answers without thought, %", 100.0, 1),
}


def scrolling(label: str, table: Markup) -> Markup:
    """A table that scrolls by itself, also by keyboard, where the screen is narrower."""
    return tag("div", table, class_="wide", role="region", aria_label=label, tabindex=0)


def cell(value: str | float | Estimate | None, scale: float = 1.0, decimals: int = -1) -> str:
    """``50.5 [47.9, 53.1]``; without decimals, as many as six digits of one of them need."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = [*vars(value).values()] if isinstance(value, Estimate) else [value]
    form = f".{decimals}f" if decimals >= 0 else ",.6g"
    texts = [format(scale * one, form) for one in parts]
    if decimals < 0 and not any("e" in text for text in texts):
        form = f",.{max(len(text.partition('.')[2]) for text in texts)}f"
    if not isinstance(value, Estimate):
        return format(scale * value, form)
    text = format(scale * value.value, form)
    if math.isnan(value.low):
        return text
    return f"{text} [{scale * value.low:{form}}, {scale * value.high:{form}}]"


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """The first cell of each row is its title; rows that are short are filled up."""
    widest = max([len(columns), *map(len, rows)])
    head = [*columns, *[""] * (widest - len(columns))]
    body = [
        tag(
            "tr",
            tag("th", row[0] if row else "", scope="row"),
            *(tag("td", own) for own in [*row, *[""] * (widest - len(row))][1:]),
        )
        for row in rows
    ]
    return tag(
        "table",
        tag("caption", caption) if caption else Markup(),
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *body),
    )


def charted(one: Table) -> dict[str, list[tuple[str, Estimate]]]:
    """The first two columns of values with intervals that have one unit and none below 0, as
    differences have: by title, (whose, value) of each row."""
    found: dict[str, list[tuple[str, Estimate]]] = {}
    units = set()
    for index, title in enumerate(one.columns):
        cells = [(str(row[0]), row[index]) for row in one.rows if index < len(row)]
        values = [(name, own) for name, own in cells if isinstance(own, Estimate)]
        if values and len(found) < 2 and units <= {title.rpartition(", ")[2]}:
            units.add(title.rpartition(", ")[2])
            found[title] = values
    lowest = [min(value.value, value.low) for own in found.values() for _, value in own]
    return {} if any(low < 0 for low in lowest) else found


def arms(tables: Sequence[Table]) -> list[str]:
    """Whose values the charts of ``study`` show."""
    return [name for one in tables for own in charted(one).values() for name, _ in own]


def study(tables: Sequence[Table], colors: Mapping[str, int]) -> Markup:
    """Each table of the studies with its note, below a chart of what comes first in it. colors: by
    name of an arm."""
    parts = []
    for one in tables:
        values = charted(one)
        if values:
            parts += [tag("h3", one.title), interval_rows(values, colors)]
        caption = "" if values else one.title
        rows = [[cell(own) for own in row] for row in one.rows]
        parts.append(scrolling(one.title or "A study", table(caption, one.columns, rows)))
        if one.note:
            parts.append(tag("p", one.note, class_="note"))
    return Markup.joined(*parts)


def evaluations(found: Sequence[Evaluation]) -> Markup:
    """All results of each, by split of the entropy."""
    return Markup.joined(*map(_evaluation, found))


def _evaluation(one: Evaluation) -> Markup:
    rows = [
        [title, *(cell(one.results[name].get(column), *form) for column in COLUMNS)]
        for name, (title, *form) in RESULTS.items()
        if name in one.results
    ]
    rows += [
        [title, *[""] * (len(COLUMNS) - 1), cell(one.results[name].get(""), *form)]
        for name, (title, *form) in RATES.items()
        if name in one.results
    ]
    thresholds = one.settings.get("entropy_thresholds")
    splits = [*COLUMNS]
    if isinstance(thresholds, list):
        for index, low in enumerate(thresholds[:3]):
            splits[index] += f", H > {low}"
    said = [
        f"{name.replace('_', ' ')} {one.settings[name]}"
        for name in ("load", "iteration", "budget", "temperature", "samples", "template")
        if isinstance(one.settings.get(name), str | int | float)
    ]
    summary = tag("summary", tag("b", one.name), f": {one.documents:,} documents")
    # The caption of a page is what its fold says already.
    shown = scrolling(one.name, table("", ["", *splits], rows))
    return tag("details", summary, shown, tag("p", ", ".join(said), class_="note"))
