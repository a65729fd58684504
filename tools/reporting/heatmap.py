"""One text of a run, each token shaded by how uncertain the model was of it."""

from collections.abc import Callable
from itertools import pairwise

from reporting.charts import place_of
from reporting.markup import Markup, tag
from reporting.reading import Run, Text

# Upper ends of the shades, in nats; above the last is the darkest.
SHADES = (0.1, 0.5, 1.0, 1.5, 2.5, 4.0)
TIERS = ("easy", "medium", "hard")
MOST_TOKENS = 600


def visible(text: str) -> str:
    """A token's text, its line breaks as marks before them."""
    return text.replace("\n", "⏎\n").replace("\t", "⇥\t")


def heatmaps(run: Run, anchor: Callable[[int, int | None, int], str | None]) -> Markup:
    """The newest text of ``run``, and the first one folded away. anchor: where the page has the
    rollouts of (iteration, sample, token), if it has."""
    if not run.texts:
        return tag(
            "p",
            "No text was written: train with --rmt-log-samples-interval, by a version that "
            "writes rmt_texts.jsonl.",
            class_="note",
        )
    first, newest = run.texts[min(run.texts)], run.texts[max(run.texts)]
    parts = [_legend(), tag("h3", f"Step {newest.iteration}"), _map(newest, anchor)]
    if first is not newest:
        summary = tag("summary", f"Step {first.iteration}, the first one shown")
        parts.append(tag("details", summary, _map(first, anchor)))
    return Markup.joined(*parts)


def _map(text: Text, anchor: Callable[[int, int | None, int], str | None]) -> Markup:
    shown = range(min(len(text.tokens), MOST_TOKENS))
    cells = [_token(text, index, anchor) for index in shown]
    left_out = len(text.tokens) - len(shown)
    if left_out:
        cells.append(tag("span", f" … {left_out} more tokens", class_="note"))
    return tag("p", *cells, class_="text")


def _token(text: Text, index: int, anchor: Callable[[int, int | None, int], str | None]) -> Markup:
    entropy, tier = text.entropies[index], text.tiers[index]
    classes = [] if entropy is None else [f"h{place_of(entropy, SHADES)}"]
    said = [] if entropy is None else [f"{entropy:.2f} nats"]
    if tier in TIERS:
        classes.append(tier)
        said.append(tier)
    token = visible(text.tokens[index])
    if index not in text.chosen:
        look = {"class_": " ".join(classes) or None, "title": ", ".join(said) or None}
        return tag("i", token, **look)
    look = {"class_": " ".join([*classes, "chosen"]), "title": ", ".join([*said, "chosen"])}
    place = anchor(text.iteration, text.sample, index - 1)
    return tag("i", token, **look) if place is None else tag("a", token, href=f"#{place}", **look)


def _legend() -> Markup:
    ends = ["0", *(f"{end:g}" for end in SHADES)]
    labels = [f"{low}-{high}" for low, high in pairwise(ends)]
    labels.append(f"above {ends[-1]}")
    shades = [tag("li", tag("i", label, class_=f"h{shade}")) for shade, label in enumerate(labels)]
    marks = [
        tag("li", tag("i", "easy", class_="easy")),
        tag("li", tag("i", "medium", class_="medium")),
        tag("li", tag("i", "hard", class_="hard")),
        tag("li", tag("i", "chosen to think about", class_="chosen")),
    ]
    return Markup.joined(
        tag("ul", tag("li", "entropy in nats:"), *shades, class_="legend text"),
        tag("ul", tag("li", "may be chosen:"), *marks, class_="legend text"),
    )
