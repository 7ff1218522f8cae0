"""Diagrams as SVG, for a page that may be light or dark, wide or narrow, on screen or on paper."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from seed_exp.reporting.page.html import Html, join, tag

WIDTH, WIDE, HEIGHT = 360, 440, 210
"""Width of a diagram of curves, width of a scatter diagram, and height of both, in pixels."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 34
"""Margins around the axes in pixels."""
NUM_COLOURS = 8
"""Number of hues in page.css; further groups reuse the hues with other dashes."""
MAX_POINTS = 200
"""Points of a curve; longer curves are averaged."""
LETTER = 6.0
"""Width of a letter of a label in pixels."""


class Curve(NamedTuple):
    """A line in a diagram."""

    name: str
    """Text shown when the pointer is on the curve."""
    group: int
    """Number of its group; the curves of a group share colour, dashes and a box that hides them."""
    x: Sequence[float]
    """Optimiser steps."""
    y: Sequence[float]
    """Values at these steps."""


class Point(NamedTuple):
    """A point in a scatter diagram."""

    label: str
    """Text beside the point; of several points with the same text, only the highest shows it."""
    meaning: str
    """Further text, shown when the pointer is on the point."""
    group: int
    """Number of its group; the points of a group share a colour."""
    x: float
    """Value on the logarithmic axis, > 0."""
    y: float
    """Value on the vertical axis."""
    series: str
    """Name of its series; a line joins the points of a series."""


class Axes(NamedTuple):
    """The map from data to pixels."""

    x_range: tuple[float, float]
    """Lowest and highest x."""
    y_range: tuple[float, float]
    """Lowest and highest y."""
    log_x: bool
    """Whether the x axis is logarithmic."""
    width: int
    """Width of the diagram in pixels."""

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = map(self._scale, self.x_range)
        return LEFT + (self.width - LEFT - RIGHT) * (self._scale(value) - low) / ((high - low) or 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.y_range
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / ((high - low) or 1))

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log_x else value


def style_of(group: int) -> str:
    """Returns the classes of page.css for the colour and dashes of a group."""
    return f"c{group % NUM_COLOURS} d{group // NUM_COLOURS % 3}"


def line_chart(title: str, curves: Sequence[Curve]) -> Html:
    """Returns a figure of the curves over optimiser steps; each needs at least one point."""
    thinned = [Curve(curve.name, curve.group, *downsampled(curve.x, curve.y)) for curve in curves]
    axes = Axes(
        (0, max(x for curve in thinned for x in curve.x)),
        _padded([y for curve in thinned for y in curve.y]),
        False,
        WIDTH,
    )
    lines = []
    for curve in thinned:
        places = [(axes.x(x), axes.y(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        classes = f"curve g{curve.group} {style_of(curve.group)}"
        if len(places) == 1:
            shape = tag(
                "circle",
                tag("title", curve.name),
                cx=_px(places[0][0]),
                cy=_px(places[0][1]),
                r=3,
                class_=f"{classes} dot",
            )
        else:
            path = "M" + "L".join(f"{_px(x)} {_px(y)}" for x, y in places)
            shape = tag("path", tag("title", curve.name), d=path, class_=classes)
        lines.append(shape)
    data = [
        {
            "name": curve.name,
            "group": curve.group,
            "x": list(curve.x),
            "y": [float(f"{y:.5g}") for y in curve.y],
        }
        for curve in thinned
    ]
    return _figure(
        title,
        axes,
        join(*lines),
        f"{title} over steps: {len(curves)} curves",
        "steps",
        {"curves": data},
    )


def scatter_chart(title: str, points: Sequence[Point], x_label: str) -> Html:
    """Returns a figure of points over a logarithmic x axis.

    A line joins the points of a series. At least one point is needed.
    """
    axes = Axes(
        _decades([point.x for point in points]), _padded([point.y for point in points]), True, WIDE
    )
    marks: list[Html] = []
    series: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        series.setdefault(point.series, []).append(point)
    for same in series.values():
        path = "M" + "L".join(f"{_px(axes.x(point.x))} {_px(axes.y(point.y))}" for point in same)
        marks.append(
            tag("path", d=path, class_=f"joined {style_of(same[0].group)}")
            if len(same) > 1
            else Html()
        )
    marks += _labels(points, axes)  # drawn before the points, so that they hide none
    for point in points:
        text = f"{point.label}, {point.meaning}: {point.y:.1f} at {point.x:,.0f}"
        place = {"cx": _px(axes.x(point.x)), "cy": _px(axes.y(point.y))}
        marks.append(
            tag("circle", tag("title", text), **place, r=5, class_=f"point {style_of(point.group)}")
        )
    return _figure(title, axes, join(*marks), f"{title}: {len(points)} points", x_label, None)


def downsampled(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Averages a curve to at most MAX_POINTS points.

    Each new point is the mean of equally many neighbours, and stands at the x of the last of them.
    """
    per_point = math.ceil(len(x) / MAX_POINTS)
    starts = range(0, len(x), per_point)
    return (
        [x[min(start + per_point, len(x)) - 1] for start in starts],
        [sum(part := y[start : start + per_point]) / len(part) for start in starts],
    )


def ticks(low: float, high: float, num: int = 5) -> list[float]:
    """Returns at most about `num` round numbers from `low` to `high`."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10 ** math.floor(math.log10(span / num))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= num)
    return [
        round(number * step, 12)
        for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def axis_number(number: float) -> str:
    """Returns a number in short form for an axis: 1.2k, 34M, 0.01."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.4g}"


def _figure(
    title: str, axes: Axes, marks: Html, description: str, x_label: str, data: dict[str, Any] | None
) -> Html:
    bottom, right = HEIGHT - BOTTOM, axes.width - RIGHT
    grid: list[Html] = []
    for value in ticks(*axes.y_range):
        y = _px(axes.y(value))
        grid.append(tag("line", x1=LEFT, x2=right, y1=y, y2=y, class_="grid"))
        grid.append(tag("text", axis_number(value), x=LEFT - 6, y=y, class_="tick y"))
    for value in _decade_ticks(axes.x_range) if axes.log_x else ticks(*axes.x_range):
        grid.append(
            tag("text", axis_number(value), x=_px(axes.x(value)), y=bottom + 14, class_="tick x")
        )
    grid.append(tag("line", x1=LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    grid.append(tag("text", x_label, x=right, y=HEIGHT - 7, class_="tick label"))
    scale = {"x": axes.x_range, "left": LEFT, "right": right}
    attributes: dict[str, Any] = {
        "viewBox": f"0 0 {axes.width} {HEIGHT}",
        "role": "img",
        "aria_label": description,
    }
    if data is not None:
        attributes["data_chart"] = json.dumps(data | scale, separators=(",", ":"))
    return tag(
        "figure",
        tag("figcaption", title),
        tag("svg", *grid, marks, **attributes),
        class_="wide" if axes.width > WIDTH else None,
    )


def _labels(points: Sequence[Point], axes: Axes) -> list[Html]:
    """Returns each label once, beside its highest point.

    Of the places right, left, above and below right, it takes the first where it hides no point
    and no other label.
    """
    highest: dict[str, Point] = {}
    for point in points:
        if point.label not in highest or point.y > highest[point.label].y:
            highest[point.label] = point
    taken = [
        (axes.x(point.x) - 5, axes.y(point.y) - 5, axes.x(point.x) + 5, axes.y(point.y) + 5)
        for point in points
    ]
    made: list[Html] = []
    for label, point in sorted(highest.items(), key=lambda item: (item[1].x, item[1].y)):
        x, y, width = axes.x(point.x), axes.y(point.y), LETTER * len(label)
        corners = [(x + 8, y - 5), (x - 8 - width, y - 5), (x - width / 2, y - 12), (x + 8, y + 10)]
        boxes = [(left, base - 9, left + width, base + 2) for left, base in corners]
        free = [
            box
            for box in boxes
            if box[0] >= 0
            and box[2] <= axes.width
            and not any(_overlap(box, other) for other in taken)
        ]
        box = free[0] if free else boxes[0]
        taken.append(box)
        to_left = box == boxes[1]
        made.append(
            tag(
                "text",
                label,
                x=_px(box[2 if to_left else 0]),
                y=_px(box[3] - 2),
                class_="name end" if to_left else "name",
            )
        )
    return made


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return max(one[0], other[0]) < min(one[2], other[2]) and max(one[1], other[1]) < min(
        one[3], other[3]
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return low - pad, high + pad


def _decades(values: Sequence[float]) -> tuple[float, float]:
    return min(values) / 3, max(values) * 2


def _decade_ticks(of: tuple[float, float]) -> list[float]:
    low, high = of
    marks = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
    ]
    inside = [mark for mark in marks if low <= mark <= high]
    return (
        inside
        if len(inside) <= 8
        else [mark for mark in inside if round(math.log10(mark), 6).is_integer()]
    )


def _px(value: float) -> str:
    return f"{value:.1f}"
