"""Where the time of a step goes, and how many tokens that makes."""

from collections.abc import Callable
from statistics import median

from reporting.charts import share_bar
from reporting.markup import Markup, tag
from reporting.reading import Run
from reporting.tables import scrolling

STEPS = 50
# By name in the file: what is done, and which tokens of the global batch it goes through.
PHASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "batch": ("batch: read the data", ()),
    "trunk": ("trunk: read the text, choose positions", ("trunk tokens",)),
    "rollout": ("rollouts: think and answer", ("branch tokens",)),
    "tree": ("tree: rewards, layout of the update", ()),
    "update": ("update: train", ("trunk tokens", "stem tokens", "branch tokens")),
}


def throughput(run: Run) -> Markup:
    """A row for each phase: medians over the last steps after the warm-up."""
    warm = {step for step, loss in run.known("warm-up loss") if loss != 0}
    steps = [step for step, _ in run.known("update seconds")]
    trained = [step for step in steps if step not in warm] or steps
    counted = frozenset(trained[-STEPS:])
    if not counted:
        return tag("p", "No step has been timed yet.", class_="note")

    def typical(name: str) -> float:
        return median([value for step, value in run.known(name) if step in counted] or [0.0])

    seconds = {phase: typical(f"{phase} seconds") for phase in PHASES}
    whole = sum(seconds.values())
    rows = [_row(phase, seconds[phase], whole, typical) for phase in PHASES]
    head = ("phase", "seconds", "share", "tokens", "tokens a second")
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *rows),
    )
    which = f"step {steps[-1]:g}" if len(counted) == 1 else f"the last {len(counted)} steps"
    kind = "" if trained is steps else " after the warm-up"
    return Markup.joined(
        scrolling("Throughput by phase", table),
        tag(
            "p",
            f"Medians over {which}{kind}: {whole:.3g} s a step on the rank that writes the file; "
            "tokens of the whole global batch. Rollouts are counted without their first token.",
            class_="note",
        ),
    )


def _row(phase: str, seconds: float, whole: float, typical: Callable[[str], float]) -> Markup:
    title, names = PHASES[phase]
    tokens = sum(typical(name) for name in names)
    share = seconds / whole if whole > 0 else 0.0
    return tag(
        "tr",
        tag("th", title, scope="row"),
        tag("td", f"{seconds:.3g}"),
        tag("td", tag("span", f"{100 * share:.0f} %"), share_bar(share, 0), class_="share"),
        tag("td", f"{tokens:,.0f}" if tokens else ""),
        tag("td", f"{tokens / seconds:,.0f}" if tokens and seconds > 0 else ""),
    )
