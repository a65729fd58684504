"""The first thing on the page: what a thought is worth on text that was not trained on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reporting.intervals import interval_rows, shown
from reporting.markup import Markup, tag
from reporting.reading import Estimate, Evaluation, Run

# By name of the result: what is said to people.
WAYS = {
    "thought": "after its thought",
    "no_thought": "after an empty thought",
    "swapped": "after another position's thought",
    "next_token_sampled": "at once, without being asked to think",
}
HELD_OUT = {
    "thought": "held-out thought",
    "no_thought": "held-out no thought",
    "next_token_sampled": "held-out next token",
}
LENGTH = "thought_length"
MOST_SHOWN = 6


@dataclass(frozen=True)
class Standing:
    """What one model does on held-out text, by name of the result; shares but for the length."""

    name: str
    results: dict[str, Estimate]


def standings(evaluations: Sequence[Evaluation], runs: Sequence[Run]) -> tuple[list[Standing], str]:
    """What is known of held-out text, and a sentence on how: by evaluations; without them, by what
    the runs measured on the way, first and last."""
    found = [_of_evaluation(one) for one in evaluations]
    found = [one for one in found if "thought" in one.results or len(one.results) > 1]
    if found:
        documents = " and ".join(sorted({f"{one.documents:,}" for one in evaluations}))
        return found, (
            f"Measured by evaluate.py on {documents} held-out documents: mean of the splits easy, "
            "medium and hard, answers drawn as in training. Lines, and brackets, are 95 % "
            "intervals over documents."
        )
    found = [standing for run in runs for standing in _of_run(run)]
    return found, (
        "Measured by the run itself (--rmt-eval-interval) on few positions. Lines are 95 % "
        "intervals as if these were independent, so rather too short."
    )


def _of_evaluation(one: Evaluation) -> Standing:
    results = {}
    differences = (f"thought_minus_{name}" for name in WAYS)
    for name in (*WAYS, *differences, LENGTH):
        columns = one.results.get(name, {})
        value = columns.get("average") or columns.get("all") or columns.get("")
        if value is not None:
            results[name] = value
    return Standing(one.name, results)


def _of_run(run: Run) -> list[Standing]:
    measured = [step for step, _ in run.known(HELD_OUT["thought"])]
    found = []
    for step in dict.fromkeys((*measured[:1], *measured[-1:])):
        results = {
            name: wilson(value, dict(run.known("held-out positions")).get(step, 0.0))
            for name, metric in HELD_OUT.items()
            for at, value in run.known(metric)
            if at == step
        }
        lengths = [value for at, value in run.known("thought length") if at <= step]
        results |= {LENGTH: Estimate(lengths[-1])} if lengths else {}
        found.append(Standing(f"{run.name}, step {step:g}", results))
    return found


def wilson(share: float, count: float) -> Estimate:
    """A share of ``count`` independent trials with Wilson's interval (JASA 22, 1927)."""
    if count < 1 or not 0 <= share <= 1:
        return Estimate(share)
    square = 1.959964**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = math.sqrt(square * (share * (1 - share) / count + square / (4 * count**2)))
    half /= 1 + square / count
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def verdicts(one: Standing) -> list[Markup]:
    """What the differences of thinking from not thinking say, in words."""
    said = {
        "no_thought": (
            "A thought helps: ",
            "A thought harms: ",
            "Whether a thought helps cannot be told: ",
            " against an empty one",
        ),
        "swapped": (
            "It is what the thought says that helps: ",
            "Another position's thought does better: ",
            "Whether it matters what the thought says cannot be told: ",
            " against another position's",
        ),
        "next_token_sampled": (
            "Thinking beats predicting at once: ",
            "Predicting at once still does better than thinking: ",
            "Whether thinking beats predicting at once cannot be told: ",
            " against the plain next token",
        ),
    }
    found = []
    for name, (more, less, unknown, against) in said.items():
        gap = one.results.get(f"thought_minus_{name}")
        if gap is None or math.isnan(gap.low):
            continue
        verdict = more if gap.low > 0 else less if gap.high < 0 else unknown
        points = f"{points_of(gap)} points{against}."
        found.append(tag("li", tag("strong", verdict), points))
    return found


def points_of(gap: Estimate) -> str:
    """A difference of shares in points of a percentage, with its interval."""
    return f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def first_and_last(found: Sequence[Standing]) -> list[Standing]:
    """Those that there is room for: the first and the last ones."""
    return [*found[:1], *found[1:][-(MOST_SHOWN - 1) :]]


def best(found: Sequence[Standing]) -> list[Markup]:
    """Who is right most often after a thought, and how often the others are; nothing of one."""
    own = [(one.name, one.results["thought"]) for one in found if "thought" in one.results]
    if len(own) < 2:
        return []
    (name, most), *others = sorted(own, key=lambda one: -one[1].value)
    said = ", ".join(f"{other} {shown(value, 100.0, ' %')}" for other, value in others)
    text = f"{name}, {shown(most, 100.0, ' %')}; {said}."
    return [tag("li", tag("strong", "Right most often after its thought: "), text)]


def headline(
    evaluations: Sequence[Evaluation], runs: Sequence[Run], colors: Mapping[str, int]
) -> Markup:
    """The section; it says so where nothing was measured. colors: by name of a standing."""
    measured, how = standings(evaluations, runs)
    found = first_and_last(measured)
    if not found:
        return tag(
            "p",
            "Nothing was measured on held-out text yet: add the JSON of evaluate.py, or train with "
            "--rmt-eval-interval and --rmt-eval-data.",
            class_="note",
        )
    parts = [
        tag("h3", "How often is the next token right?"),
        interval_rows(_of_each(found, WAYS), colors, 100.0, " %"),
    ]
    if any(LENGTH in one.results for one in found):
        parts.append(tag("h3", "How long does it think?"))
        parts.append(interval_rows(_of_each(found, {LENGTH: "tokens of a thought"}), colors))
    sentences = verdicts(found[-1])
    if sentences:
        verdict = tag("p", "The verdict on ", tag("b", found[-1].name), ":")
        parts.insert(0, Markup.joined(verdict, tag("ul", *sentences, class_="verdicts")))
    if comparison := best(found):
        parts.insert(0, tag("ul", *comparison, class_="verdicts"))
    if len(found) < len(measured):
        how += f" {len(measured) - len(found)} others are in the tables below."
    return Markup.joined(*parts, tag("p", how, class_="note"))


def _of_each(
    found: Sequence[Standing], names: Mapping[str, str]
) -> dict[str, list[tuple[str, Estimate]]]:
    return {
        title: [(one.name, one.results[name]) for one in found if name in one.results]
        for name, title in names.items()
    }
