"""Charts as SVG: lines over the steps of a run, and values with their intervals.

Colours and dashes are classes that the page's style sheet defines for light and dark; each series
has a dash of its own too, so that none is told by its colour alone. Sizes are CSS pixels of a
narrow screen, so that the text of a chart can be read on a phone.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reporting.markup import Markup, tag
from reporting.reading import Estimate

WIDTH, HEIGHT = 360, 222
LEFT, RIGHT, TOP, BOTTOM = 42, 50, 10, 38
# Of a line; more of them no screen shows.
MOST_POINTS = 240
SERIES = 6
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    points: (step, value), ascending. color, dash: from 0 to ``SERIES`` - 1. smooth: the line is a
    moving average, and what was measured is drawn faintly behind it.
    """

    label: str
    points: Sequence[Point]
    color: int
    dash: int
    smooth: bool = True


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Centred means over ``window`` points (odd), over fewer at both ends."""
    half = window // 2
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found = []
    for index, (step, _) in enumerate(points):
        first, limit = max(0, index - half), min(len(points), index + half + 1)
        found.append((step, (sums[limit] - sums[first]) / (limit - first)))
    return found


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points: the first, the last, and others evenly."""
    if len(points) <= most:
        return [*points]
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``, which differ."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters."""
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    if 1000 <= abs(value) < 10000:
        return f"{value:.0f}"
    return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-")


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.3g}%"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    form: Callable[[float], str] = short,
    from_zero: bool = True,
    span: tuple[float, float] | None = None,
    warm_up: float | None = None,
) -> Markup:
    """Lines over the steps, each with its last value beside it; nothing of no points.

    form: how values are written. span: first and last step of the axis; None: of the points.
    warm_up: where a shaded part ends.
    """
    drawn = [one for one in series if one.points]
    if not drawn:
        return Markup()
    steps = [step for one in drawn for step, _ in one.points]
    first, last = span or (min(steps), max(steps))
    first, last = (first, last) if last > first else (first - 1, last + 1)
    lines = [_of_series(one) for one in drawn]
    values = [value for line in lines for part in line for _, value in part]
    low, high = min(values), max(values)
    if from_zero and low >= 0:
        low = 0.0
    if high - low <= 1e-9 * max(1.0, abs(high)):
        high = low + (abs(low) or 1.0)
    marks = ticks(low, high)
    low, high = marks[0], marks[-1]

    def across(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    if warm_up is not None and warm_up > first:
        end = min(across(warm_up), WIDTH - RIGHT)
        shade = {"width": round(end - LEFT, 1), "height": HEIGHT - TOP - BOTTOM}
        parts.append(tag("rect", class_="warm", x=LEFT, y=TOP, **shade))
        if end - LEFT > 50:
            parts.append(tag("text", "warm-up", class_="axis", x=LEFT + 4, y=HEIGHT - BOTTOM - 5))
    for mark in marks:
        y = round(down(mark), 1)
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(tag("text", form(mark), class_="axis right", x=LEFT - 5, y=y + 4))
    for mark in _whole_ticks(first, last):
        x = round(across(mark), 1)
        parts.append(tag("text", f"{mark:g}", class_="axis middle", x=x, y=HEIGHT - BOTTOM + 15))
    parts.append(
        tag("text", "step", class_="axis middle", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5),
    )
    for one, (faint, line) in zip(drawn, lines, strict=True):
        look = f"c{one.color % SERIES}"
        if faint:
            parts.append(tag("path", class_=f"faint {look}", d=_path(faint, across, down)))
        parts.append(
            tag("path", class_=f"line {look} d{one.dash % SERIES}", d=_path(line, across, down))
        )
        if len(line) <= 12:
            parts += [
                tag(
                    "circle",
                    class_=f"dot {look}",
                    cx=round(across(step), 1),
                    cy=round(down(value), 1),
                    r=2.6,
                )
                for step, value in line
            ]
    ends = [
        (down(line[-1][1]), (one, line[-1])) for one, (_, line) in zip(drawn, lines, strict=True)
    ]
    for y, (one, (step, value)) in _apart(ends):
        place = {"x": round(across(step) + 6, 1), "y": round(y + 4, 1)}
        parts.append(tag("text", form(value), class_=f"end t{one.color % SERIES}", **place))
    spoken = "; ".join(
        f"{one.label or title}: {form(line[0][1])} at step {line[0][0]:g}, "
        f"{form(line[-1][1])} at step {line[-1][0]:g}"
        for one, (_, line) in zip(drawn, lines, strict=True)
    )
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}. {spoken}",
    )


def _of_series(one: Series) -> tuple[list[Point], list[Point]]:
    """(what was measured, if it is drawn behind the line; the line)."""
    window = (len(one.points) // 12) | 1
    if not one.smooth or window < 3:
        return [], thinned(one.points)
    return thinned(one.points), thinned(smoothed(one.points, window))


def _path(
    points: Sequence[Point], across: Callable[[float], float], down: Callable[[float], float]
) -> str:
    places = [f"{across(step):.1f} {down(value):.1f}" for step, value in points]
    return "M" + "L".join(places if len(places) > 1 else places * 2)


def _whole_ticks(first: float, last: float) -> list[float]:
    found = sorted({float(round(mark)) for mark in ticks(first, last, 6)})
    return [mark for mark in found if first <= mark <= last]


def _apart(labels: list[tuple[float, Any]], distance: float = 13.0) -> list[tuple[float, Any]]:
    """Labels at heights that leave each of them room, in order of height, inside the chart."""
    labels = sorted(labels, key=lambda label: label[0])
    heights: list[float] = []
    for height, _ in labels:
        heights.append(max(height, heights[-1] + distance if heights else TOP))
    bottom = HEIGHT - BOTTOM + 2.0
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], bottom)
        bottom = heights[index] - distance
    return [(height, what) for height, (_, what) in zip(heights, labels, strict=True)]


def legend(entries: Sequence[tuple[str, int, int]]) -> Markup:
    """What each (label, color, dash) is; nothing where no label says more than the title."""
    items = [
        tag(
            "li",
            tag(
                "svg",
                tag(
                    "line",
                    class_=f"line c{color % SERIES} d{dash % SERIES}",
                    x1=1,
                    x2=27,
                    y1=6,
                    y2=6,
                ),
                width=28,
                height=12,
                aria_hidden="true",
            ),
            label,
        )
        for label, color, dash in entries
        if label
    ]
    return tag("ul", *items, class_="legend") if items else Markup()


def interval_bar(estimate: Estimate, low: float, high: float, color: int) -> Markup:
    """A value as a dot and its interval as a line, on an axis from ``low`` to ``high`` as wide as
    the place that it is put in."""

    def across(value: float) -> str:
        return f"{100 * min(max((value - low) / (high - low), 0.0), 1.0):.2f}%"

    look = f"c{color % SERIES}"
    parts = [tag("line", class_="grid", x1="0%", x2="100%", y1=9, y2=9)]
    if low < 0 < high:
        parts.append(tag("line", class_="zero", x1=across(0), x2=across(0), y1=0, y2=18))
    if not math.isnan(estimate.low):
        ends = {"x1": across(estimate.low), "x2": across(estimate.high)}
        parts.append(tag("line", class_=f"whisker {look}", y1=9, y2=9, **ends))
        parts += [
            tag("line", class_=f"cap {look}", x1=end, x2=end, y1=4, y2=14) for end in ends.values()
        ]
    parts.append(_dot(across(estimate.value), color))
    return tag("svg", *parts, class_="bar", height=18, aria_hidden="true")


def _dot(x: str, color: int) -> Markup:
    """Round, square or open, as its color is."""
    look = f"dot c{color % SERIES}"
    if color % 3 == 1:
        return tag(
            "svg",
            tag("rect", class_=look, x=-5, y=-5, width=10, height=10),
            x=x,
            y=9,
            overflow="visible",
        )
    if color % 3 == 2:
        return tag("circle", class_=f"{look} open", cx=x, cy=9, r=5)
    return tag("circle", class_=look, cx=x, cy=9, r=5)


def share_bar(share: float, color: int) -> Markup:
    """A share of a whole as the length of a bar."""
    width = f"{100 * min(max(share, 0.0), 1.0):.2f}%"
    return tag(
        "svg",
        tag("rect", class_="track", x=0, y=3, width="100%", height=12),
        tag("rect", class_=f"dot c{color % SERIES}", x=0, y=3, width=width, height=12),
        class_="bar",
        height=18,
        aria_hidden="true",
    )


def place_of(value: float, limits: Sequence[float]) -> int:
    """How many of the ascending ``limits`` lie below ``value``: which shade it gets."""
    return bisect_left(limits, value)
