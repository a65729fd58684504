"""The page: one file of HTML that needs nothing but itself, and no script.

What a run wrote is text here, never markup (``markup``); should some of it get through all the
same, the page's own policy (Content-Security-Policy) lets it run nothing and fetch nothing.
"""

import functools
from collections.abc import Sequence

from reporting import curves, headline, heatmap, rollouts, tables, throughput
from reporting.markup import Markup, tag
from reporting.reading import Inputs, Run
from reporting.style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
Section = tuple[str, str, str, Markup]


def page(inputs: Inputs, *, title: str, written: str, every: float | None = None) -> str:
    """HTML of everything in ``inputs``. written: when. every: seconds until it may
    be written again."""
    sections = [one for one in _sections(inputs) if one[3]]
    links = [tag("a", name, href=f"#{place}") for place, name, _, _ in sections]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        # Ours alone; an element of style knows no escapes.
        tag("style", Markup(STYLE)),
    ]
    body = [
        tag("a", "to the numbers", href=f"#{sections[0][0]}", class_="skip"),
        tag("header", tag("h1", title), _about(inputs), _status(inputs.runs, written, every)),
        tag("nav", *links, _theme(), aria_label="Sections"),
        tag("main", *map(_section, sections)),
    ]
    document = tag("html", tag("head", *head), tag("body", *body), lang="en")
    return f"<!doctype html>\n{document}\n"


def _about(inputs: Inputs) -> Markup:
    return tag(
        "p",
        "Reinforcement mid-training teaches a language model to think before it predicts the next "
        "token of plain text: at uncertain positions it writes several short thoughts within a "
        "token budget, each followed by a prediction, and is rewarded where the prediction is "
        "right.",
        class_="about",
    )


def _status(runs: Sequence[Run], written: str, every: float | None) -> Markup:
    parts = []
    for run in runs:
        steps = int(run.iterations[-1]) if run.iterations else 0
        lines = [tag("b", run.name), f": {steps} step{'' if steps == 1 else 's'}"]
        parts.append(tag("li", *lines, *(tag("div", one) for one in run.problems)))
    again = "" if every is None else f", again every {every:g} s: reload to see the newest"
    return Markup.joined(
        tag("ul", *parts, class_="runs") if parts else Markup(),
        tag("p", f"Written {written}{again}.", class_="note"),
    )


def _theme() -> Markup:
    """Light, dark, or as the system has it; the style sheet reads which is checked."""
    choices = [
        tag(
            "label",
            tag("input", type="radio", name="theme", value=name, checked=name == "auto", id=name),
            name,
        )
        for name in ("auto", "light", "dark")
    ]
    return tag("fieldset", tag("legend", "Colours"), *choices)


def _sections(inputs: Inputs) -> list[Section]:
    """(place, name, what is to be seen, content) of each."""
    runs, colors = inputs.runs, _colors(inputs)
    measured = any(headline.standings(inputs.evaluations, runs)[0]) or not inputs.tables
    return [
        (
            "headline",
            "What a thought is worth",
            "",
            headline.headline(inputs.evaluations, runs, colors) if measured else Markup(),
        ),
        ("study", "Study", "", tables.study(inputs.tables, colors)),
        (
            "curves",
            "Step by step",
            "Bold lines are moving averages, faint ones what was measured; numbers at the right "
            "are the last.",
            curves.curves(runs, colors) if runs else Markup(),
        ),
        (
            "uncertainty",
            "Where it thinks",
            "A training text, each token shaded by the entropy of the model's prediction of it. "
            "Positions to think about are drawn from the uncertain ones; follow one to its "
            "rollouts.",
            _of_runs(
                runs,
                [
                    heatmap.heatmaps(run, functools.partial(_anchor, number, run))
                    for number, run in enumerate(runs)
                ],
            ),
        ),
        (
            "rollouts",
            "What it thinks",
            "A few positions with all their rollouts, the best rewarded first. Unfold one: the "
            "text, how it truly goes on, and each thought with its answer.",
            _of_runs(runs, [rollouts.rollouts(number, run) for number, run in enumerate(runs)]),
        ),
        (
            "throughput",
            "Where the time goes",
            "",
            _of_runs(runs, [throughput.throughput(run) for run in runs]),
        ),
        (
            "evaluations",
            "All numbers of the evaluations",
            "With 95 % intervals over documents.",
            tables.evaluations(inputs.evaluations),
        ),
    ]


def _colors(inputs: Inputs) -> dict[str, int]:
    """One for each name that charts show: a run's is that of the evaluation of the same name."""
    measured, _ = headline.standings(inputs.evaluations, inputs.runs)
    names = [run.name for run in inputs.runs] if len(inputs.runs) > 1 else []
    names += [one.name for one in headline.first_and_last(measured)]
    names += tables.arms(inputs.tables)
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _anchor(number: int, run: Run, iteration: int, sample: int | None, token: int) -> str | None:
    """Where the page has the rollouts at a token, if it has."""
    place = f"run{number}-step{iteration}-sample{sample}-token{token}"
    return place if place in rollouts.anchors(number, run) else None


def _of_runs(runs: Sequence[Run], parts: Sequence[Markup]) -> Markup:
    """One run as it is; several folded away under their names."""
    if len(runs) <= 1:
        return Markup.joined(*parts)
    folds = [
        tag("details", tag("summary", tag("b", run.name)), part, open=number == 0)
        for number, (run, part) in enumerate(zip(runs, parts, strict=True))
    ]
    return Markup.joined(*folds)


def _section(section: Section) -> Markup:
    place, name, lead, content = section
    return tag(
        "section",
        tag("h2", name, id=f"{place}-title"),
        tag("p", lead, class_="lead") if lead else Markup(),
        content,
        id=place,
        aria_labelledby=f"{place}-title",
    )
