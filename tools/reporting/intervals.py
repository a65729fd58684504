"""Values with their intervals, below each other on one axis from 0."""

import math
from collections.abc import Mapping, Sequence

from reporting.charts import interval_bar, ticks
from reporting.markup import Markup, tag
from reporting.reading import Estimate


def shown(estimate: Estimate, scale: float = 1.0, unit: str = "") -> str:
    """``26.8 % [23.3, 30.4]``."""
    text = f"{scale * estimate.value:.1f}{unit}"
    if math.isnan(estimate.low):
        return text
    return f"{text} [{scale * estimate.low:.1f}, {scale * estimate.high:.1f}]"


def interval_rows(
    values: Mapping[str, Sequence[tuple[str, Estimate]]],
    colors: Mapping[str, int],
    scale: float = 1.0,
    unit: str = "",
) -> Markup:
    """A row for each of (whose, value), under the title of what it is; nothing of no values.

    colors: by whose. scale, unit: of what is written.
    """
    values = {title: own for title, own in values.items() if own}
    found = [one for own in values.values() for _, one in own]
    if not found:
        return Markup()
    highest = max(max(filter(math.isfinite, (one.value, one.high))) for one in found)
    high = ticks(0.0, highest if highest > 0 else 1.0)[-1]
    rows = []
    for title, own in values.items():
        lines = [
            tag(
                "div",
                tag("span", name, class_="who"),
                interval_bar(one, 0.0, high, colors[name]),
                tag("span", shown(one, scale, unit), class_="value"),
                class_="interval",
            )
            for name, one in own
        ]
        rows.append(tag("div", tag("dt", title), tag("dd", *lines), class_="way"))
    axis = tag(
        "div",
        tag("span", "0"),
        tag("span", f"{scale * high:g}{unit}"),
        class_="scale",
        aria_hidden="true",
    )
    return Markup.joined(tag("dl", *rows, class_="ways"), axis)
