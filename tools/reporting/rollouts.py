"""What the model thought at a few positions, group by group."""

from collections.abc import Sequence
from itertools import pairwise

from reporting.charts import place_of
from reporting.heatmap import visible
from reporting.markup import Markup, tag
from reporting.reading import Rollout, Run

# Lower ends of the shades, in nats of log-prob, from the likeliest; below the last is the darkest.
SHADES = (0.1, 0.5, 1.0, 2.0, 4.0)
STEPS = 3
# Of a response: more are cut out of its middle.
MOST_TOKENS, KEPT_AT_END = 240, 40
MOST_CHARACTERS = 4000

Group = list[Rollout]


def shown_steps(run: Run) -> list[int]:
    """Steps whose rollouts are on the page: the newest ones, newest first, and the first."""
    steps = sorted(run.rollouts, reverse=True)
    return [*steps[:STEPS], *steps[STEPS:][-1:]]


def groups_of(rollouts: Sequence[Rollout]) -> list[Group]:
    """Rollouts by position, in order; of older files, which name none, by context and truth."""
    found: dict[tuple[object, ...], Group] = {}
    for one in rollouts:
        place = (one.sample, one.token)
        key = place if None not in place else (one.context, one.truth)
        found.setdefault(key, []).append(one)
    return list(found.values())


def has_variance(group: Group) -> bool:
    """Whether its rollouts have advantages; of older files, whether their rewards differ."""
    advantages = [one.advantage for one in group]
    if None not in advantages:
        return any(advantages)
    return len({one.reward for one in group}) > 1


def anchor_of(number: int, iteration: int, one: Rollout) -> str | None:
    """The name of a group's place on the page; None in older files. number: of its run."""
    if one.sample is None or one.token is None:
        return None
    return f"run{number}-step{iteration}-sample{one.sample}-token{one.token}"


def anchors(number: int, run: Run) -> frozenset[str]:
    """Those of all groups of ``run`` that are on the page."""
    return frozenset(
        place
        for step in shown_steps(run)
        for one in run.rollouts[step]
        if (place := anchor_of(number, step, one)) is not None
    )


def rollouts(number: int, run: Run) -> Markup:
    """The steps of ``run``, number ``number`` of the page, with their groups to be unfolded."""
    if not run.rollouts:
        return tag(
            "p", "No rollouts were written: train with --rmt-log-samples-interval.", class_="note"
        )
    parts = [_legend()] if any(own.tokens for of in run.rollouts.values() for own in of) else []
    for step in shown_steps(run):
        parts.append(tag("h3", f"Step {step}"))
        parts += [_group(group, anchor_of(number, step, group[0])) for group in _of(run, step)]
    return Markup.joined(*parts)


def _of(run: Run, step: int) -> list[Group]:
    return groups_of(run.rollouts[step])


def _group(group: Group, anchor: str | None) -> Markup:
    first = group[0]
    rights = [one.right for one in group]
    facts = []
    if None not in rights:
        facts.append(f"{sum(map(bool, rights))} of {len(group)} right")
    rewards = [one.reward for one in group if one.reward is not None]
    if rewards:
        facts.append(f"mean reward {sum(rewards) / len(rewards):.3f}")
    if first.entropy is not None:
        facts.append(f"{first.entropy:.2f} nats")
    end = first.context[-60:]
    summary = tag(
        "summary",
        tag("span", "…", visible(end), class_="context"),
        tag("b", visible(first.truth[:24]), class_="truth"),
        tag("span", ", ".join(facts), class_="facts"),
        Markup()
        if has_variance(group)
        else tag("span", "no variance: teaches nothing", class_="badge"),
    )
    text = tag(
        "p",
        tag("span", visible(first.context), class_="context"),
        tag("b", visible(first.truth), class_="truth"),
        class_="text",
    )
    # The best first, as they are compared with each other.
    ordered = sorted(group, key=lambda one: -(one.reward if one.reward is not None else 0.0))
    answers = tag("ol", *map(_rollout, ordered), class_="rollouts")
    return tag("details", summary, text, answers, id=anchor, class_="group")


def _rollout(one: Rollout) -> Markup:
    mark = {True: "✓ right", False: "✗ wrong", None: ""}[one.right]
    facts = [
        tag("span", mark, class_="right" if one.right else "wrong") if mark else Markup(),
        tag("span", "says ", tag("b", visible(one.prediction[:MOST_CHARACTERS]) or "nothing")),
    ]
    if one.reward is not None:
        facts.append(tag("span", f"reward {one.reward:.3f}"))
    if one.advantage is not None:
        facts.append(tag("span", f"advantage {one.advantage:+.2f}"))
    said = _shaded(one) if one.tokens else visible(one.thought[:MOST_CHARACTERS])
    return tag("li", tag("div", *facts, class_="facts"), tag("p", said, class_="text"))


def _shaded(one: Rollout) -> Markup:
    """The whole response, each token shaded by how unlikely it was when it was drawn."""
    cells = [
        tag("i", visible(text), class_="written", title="written, not drawn")
        if value is None
        else tag("i", visible(text), class_=f"p{place_of(-value, SHADES)}", title=f"{value:.2f}")
        for text, value in zip(one.tokens, one.log_probs, strict=True)
    ]
    left_out = len(cells) - MOST_TOKENS
    if left_out > 0:
        gap = tag("span", f" … {left_out} tokens … ", class_="note")
        cells = [*cells[: MOST_TOKENS - KEPT_AT_END], gap, *cells[-KEPT_AT_END:]]
    return Markup.joined(*cells)


def _legend() -> Markup:
    ends = ["0", *(f"{-end:g}" for end in SHADES)]
    labels = [f"{high} to {low}" for high, low in pairwise(ends)] + [f"below {ends[-1]}"]
    shades = [tag("li", tag("i", label, class_=f"p{shade}")) for shade, label in enumerate(labels)]
    shades.append(tag("li", tag("i", "written, not drawn", class_="written")))
    return tag("ul", tag("li", "log-prob of a token in nats:"), *shades, class_="legend text")
