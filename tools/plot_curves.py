"""Draw the curves of an RMT run: what thoughts are worth, then match rate, reward, loss, ...

    python tools/plot_curves.py runs/quickstart/checkpoint/rmt_metrics.jsonl --output curves.png

The input holds one JSON object per iteration, as ``megatron_rmt.job.metrics`` writes it. The first
panel is of held-out positions where the run measured some (--rmt-eval-interval), else of its own. A
panel whose values are missing from the whole file is left out. The format warm-up is shaded:
answers are given there, so that nothing is predicted.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator

from json_lines import read_rows


@dataclass(frozen=True)
class Panel:
    """One pair of axes: the metrics drawn in it, by name in the file, with their labels."""

    title: str
    unit: str
    metrics: dict[str, str]
    is_share: bool = False


HELD_OUT = Panel(
    "Held-out text: next token predicted",
    "of the positions",
    {
        "held-out thought": "after a thought",
        "held-out no thought": "after an empty thought",
        "held-out next token": "plain next token",
    },
    is_share=True,
)
TRAINING = Panel(
    "Next token predicted",
    "of the predictions",
    {"match rate": "thought, then answer", "next-token accuracy": "plain next token, all text"},
    is_share=True,
)
PANELS = (
    TRAINING,
    Panel(
        "Gain by the thought",
        "nats per token",
        {"information gain": "rollouts", "held-out gain": "held-out text"},
    ),
    Panel(
        "Form of the responses",
        "of the rollouts",
        {"well-formed rate": "well-formed answer", "closed by itself": "thought closed by itself"},
        is_share=True,
    ),
    Panel("Reward", "mean over the rollouts", {"reward": ""}),
    Panel("Thought", "tokens", {"thought length": "mean length", "budget": "budget $B_t$"}),
    Panel("Next-token loss, positions not chosen", "nats per token", {"ntp loss": ""}),
    Panel(
        "Chosen positions",
        "of the positions",
        {"chosen easy": "easy", "chosen medium": "medium", "chosen hard": "hard"},
        is_share=True,
    ),
)
LARGEST_SHOWN = 1e100
COLORS = ("#1f5fa8", "#c8501e", "#3c8f4a")


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of the metrics file, float64 [iterations], NaN where an iteration lacks a value.

    A run that was resumed repeats iterations: from there on only its lines count.

    Raises:
        ValueError: the file cannot be read, is empty, or has a line that is no metrics object.
    """
    records: list[dict[str, Any]] = []
    for row in read_rows(path):
        record = row.values
        iteration = record.get("iteration")
        if not isinstance(iteration, int) or not 0 <= iteration < 2**53:
            raise ValueError(
                f'{row.place}: not an object with an integer "iteration"; give the file that the '
                "training wrote."
            )
        while records and records[-1]["iteration"] >= iteration:
            records.pop()
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no iteration yet: train at least one step.")
    names = dict.fromkeys(name for record in records for name in record)
    return {name: np.array([_number(r.get(name)) for r in records]) for name in names}


def _number(value: Any) -> float:
    """``value`` if it is a number that an axis can show, else NaN."""
    shown = isinstance(value, int | float) and abs(value) < LARGEST_SHOWN
    return float(value) if shown else math.nan


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over ``window`` values, over fewer at both ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def plot_curves(metrics: dict[str, np.ndarray], title: str = "") -> plt.Figure:
    """The panels that have a value, over the iterations.

    Raises:
        ValueError: none has.
    """
    known = {name for name, values in metrics.items() if np.isfinite(values).any()}
    headlines = [HELD_OUT] if known & {*HELD_OUT.metrics} else []
    panels = [panel for panel in (*headlines, *PANELS) if known & {*panel.metrics}]
    if not panels:
        raise ValueError(
            f"the metrics file has none of {', '.join(m for p in PANELS for m in p.metrics)}: "
            "give the file that an RMT run wrote."
        )
    columns = min(3, len(panels))
    # The first panel is as wide as it takes to leave no place empty.
    width = 1 + -len(panels) % columns
    cells = [0] * width + [*range(1, len(panels))]
    mosaic = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    size = (4.6 * columns, 3.3 * len(mosaic))
    figure, axes = plt.subplot_mosaic(mosaic, figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    warm_up = warm_up_end(metrics)
    window = len(metrics["iteration"]) // 10 | 1  # odd, so that it is centred
    for axis, panel in zip(axes.values(), panels, strict=True):
        for color, (name, label) in zip(COLORS, panel.metrics.items(), strict=False):
            if name in known:
                measured = np.isfinite(metrics[name])
                points = metrics["iteration"][measured], metrics[name][measured]
                # Measured every N steps, over the same positions.
                own = 1 if name.startswith("held-out") else window
                _draw(axis, *points, own, color, label, is_schedule=name == "budget")
        axis.set_title(panel.title, loc="left", fontsize=11)
        axis.set_ylabel(panel.unit)
        averaged = window > 1 and not all(name.startswith("held-out") for name in panel.metrics)
        axis.set_xlabel("iteration" if not averaged else f"iteration (lines: mean over {window})")
        margin = 0.5 + 0.02 * np.ptp(metrics["iteration"])
        axis.set_xlim(metrics["iteration"][0] - margin, metrics["iteration"][-1] + margin)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(color="#d9d9d9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        if panel.is_share:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        if panel.is_share or (len(panel.metrics) > 1 and axis.get_ylim()[0] > 0):
            axis.set_ylim(bottom=0.0)
        if warm_up is not None:
            axis.axvspan(metrics["iteration"][0] - margin, warm_up, color="#efe9dc", zorder=0)
            place = {"transform": axis.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            middle = (metrics["iteration"][0] - margin + warm_up) / 2
            axis.text(middle, 0.03, "warm-up", fontsize=8, color="#8a7d5e", **place)
        if any(panel.metrics.values()):
            axis.legend(frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def warm_up_end(metrics: dict[str, np.ndarray]) -> float | None:
    """Between the last step of the format warm-up and the next; None without one."""
    losses = metrics.get("warm-up loss", np.zeros(1))
    warm = np.flatnonzero(np.isfinite(losses) & (losses != 0))
    return float(metrics["iteration"][warm[-1]]) + 0.5 if len(warm) else None


def _draw(
    axis: plt.Axes,
    iterations: np.ndarray,
    values: np.ndarray,
    window: int,
    color: str,
    label: str,
    is_schedule: bool,
) -> None:
    """A schedule as it is; what was measured as points, with their moving average as a line."""
    if is_schedule:
        axis.plot(iterations, values, color=color, linestyle="--", linewidth=1.8, label=label)
        return
    axis.plot(
        iterations,
        values,
        linestyle="none",
        marker="o",
        markersize=4 if len(values) <= 60 else 2,
        markeredgewidth=0,
        color=color,
        alpha=0.35 if window > 1 else 0.9,
    )
    average = moving_average(values, min(window, (len(values) - 1) | 1))
    axis.plot(iterations, average, color=color, linewidth=1.8, label=label or None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", type=Path, help="JSON lines, one object per iteration")
    parser.add_argument("--output", type=Path, required=True, help="picture to write (.png, .svg)")
    parser.add_argument("--title", default="", help="a line above the panels")
    options = parser.parse_args(arguments)
    try:
        metrics = read_metrics(options.metrics)
        figure = plot_curves(metrics, options.title)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.output, dpi=150)
    except (ValueError, OSError) as error:
        sys.exit(f"plot_curves.py: {error}")
    print(f"{options.output}: {np.count_nonzero(metrics['iteration'])} iterations")


if __name__ == "__main__":
    main()
