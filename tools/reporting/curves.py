"""The curves of one or several runs: what was measured, step by step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from reporting.charts import Series, legend, line_chart, percent, short
from reporting.markup import Markup, tag
from reporting.reading import Run


@dataclass(frozen=True)
class Panel:
    """One chart: its metrics by name in the file, with their labels.

    meaning: what it shows, in a sentence. schedules: metrics that are set, not measured, and so are
    drawn as they are. form: how values are written.
    """

    title: str
    meaning: str
    metrics: dict[str, str]
    form: Callable[[float], str] = short
    schedules: frozenset[str] = frozenset()
    from_zero: bool = True


PANELS = (
    Panel(
        "Held-out text: right next tokens",
        "Text that was not trained on. Above the empty thought, thinking helps.",
        {
            "held-out thought": "after a thought",
            "held-out no thought": "after an empty thought",
            "held-out next token": "at once",
        },
        percent,
        frozenset(("held-out thought", "held-out no thought", "held-out next token")),
    ),
    Panel(
        "Budget and thought length, tokens",
        "The budget is asked for in the prompt, and shrinks. A thought ends at twice of it.",
        {"thought length": "thought, mean", "budget": "budget"},
        schedules=frozenset(("budget",)),
    ),
    Panel(
        "Answers of the rollouts",
        "Right: how the text goes on. Well-formed: an answer could be read at all.",
        {
            "match rate": "right",
            "well-formed rate": "well-formed",
            "closed by itself": "thought closed by itself",
        },
        percent,
    ),
    Panel(
        "Reward",
        "What is trained on: right answers and, with less weight, a length near the budget.",
        {"reward": "reward", "length reward": "its length part, unweighted"},
    ),
    Panel(
        "Tiers of the chosen positions",
        "The curriculum goes from easy to hard; a tier without positions hands on its share.",
        {
            "chosen easy": "easy",
            "chosen medium": "medium",
            "chosen hard": "hard",
        },
        percent,
    ),
    Panel(
        "Entropy of the next token, nats",
        "How uncertain the model is, over all text and where it was made to think.",
        {"entropy": "all text", "entropy of chosen": "chosen positions"},
    ),
    Panel(
        "Loss of next-token training, nats",
        "Over the positions that were not chosen; plain pre-training goes on there.",
        {"ntp loss": "loss"},
        from_zero=False,
    ),
    Panel(
        "Gain by the thought, nats a token",
        "How much likelier the truth is after a thought than without; below 0 it does harm.",
        {"information gain": "rollouts", "held-out gain": "held-out text"},
        schedules=frozenset(("held-out gain",)),
    ),
    Panel(
        "Groups that teach nothing",
        "All rollouts at a position earned the same, so that none has an advantage.",
        {"zero-variance groups": "without variance"},
        percent,
    ),
    Panel(
        "Rollouts against update, nats",
        "Difference of a token's log-prob when drawn and when trained; rounding only, if all is "
        "well.",
        {"logprob difference": "mean difference"},
    ),
    Panel(
        "Seconds of a step",
        "On the rank that writes the file; rollouts are the thinking, update the training.",
        {
            "rollout seconds": "rollouts",
            "update seconds": "update",
            "trunk seconds": "trunk",
        },
    ),
)


def curves(runs: Sequence[Run], colors: Mapping[str, int]) -> Markup:
    """A chart of each panel that any run has values of. colors: by name of a run."""
    figures = [_figure(panel, runs, colors) for panel in PANELS]
    found = Markup.joined(*figures)
    if not found:
        return tag("p", "No step has been written yet.", class_="note")
    return tag("div", found, class_="charts")


def _figure(panel: Panel, runs: Sequence[Run], colors: Mapping[str, int]) -> Markup:
    """One run: a color for each metric. Several: a color for each run, a dash for each metric."""
    alone = len(runs) == 1
    metrics = [name for name in panel.metrics if any(run.known(name) for run in runs)]
    series = [
        Series(
            label=panel.metrics[name] if alone else f"{run.name}, {panel.metrics[name]}",
            points=run.known(name),
            color=line if alone else colors[run.name],
            dash=line,
            smooth=name not in panel.schedules,
        )
        for run in runs
        for line, name in enumerate(metrics)
    ]
    chart = line_chart(
        panel.title,
        series,
        form=panel.form,
        from_zero=panel.from_zero,
        span=span_of(runs),
        warm_up=warm_up_end(runs[0]) if alone else None,
    )
    if not chart:
        return chart
    if alone:
        entries = [(one.label, one.color, one.dash) for one in series]
    else:
        entries = [(run.name, colors[run.name], 0) for run in runs]
        labels = [panel.metrics[name] for name in metrics]
        # Grey, as a dash belongs to the metric of every run.
        entries += [(label, -1, dash) for dash, label in enumerate(labels) if len(labels) > 1]
    return tag(
        "figure",
        tag("figcaption", tag("h3", panel.title), tag("p", panel.meaning)),
        legend(entries),
        chart,
    )


def span_of(runs: Sequence[Run]) -> tuple[float, float] | None:
    """First and last step of all runs, so that charts below each other can be compared; None
    before any."""
    steps = [step for run in runs for step in (*run.iterations[:1], *run.iterations[-1:])]
    return (min(steps), max(steps)) if steps else None


def warm_up_end(run: Run) -> float | None:
    """Between the last step of the format warm-up and the next; None without one."""
    warm = [step for step, loss in run.known("warm-up loss") if loss != 0]
    return warm[-1] + 0.5 if warm else None
