from __future__ import annotations

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from seed_exp.reporting.page.html import Html, join, tag
from seed_exp.reporting.page.plots import (
    MAX_POINTS,
    WIDTH,
    Curve,
    Point,
    axis_number,
    downsampled,
    line_chart,
    scatter_chart,
    ticks,
)


def numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<script>", tag("b", "&"), class_='"x"', hidden=True, id=None) == (
        '<p class="&quot;x&quot;" hidden>&lt;script&gt;<b>&amp;</b></p>'
    )
    assert join("<", Html("<")) == "&lt;<"


def test_a_long_curve_is_thinned_to_means_of_neighbours() -> None:
    x, y = list(range(1, 1001)), [float(number % 7) for number in range(1000)]
    steps, values = downsampled(x, y)
    size = math.ceil(1000 / MAX_POINTS)
    assert len(steps) <= MAX_POINTS
    assert steps == [min(start + size, 1000) for start in range(0, 1000, size)]
    assert values == [
        pytest.approx(sum(y[start : start + size]) / len(y[start : start + size]))
        for start in range(0, 1000, size)
    ]
    assert downsampled([1, 2], [3, 4]) == ([1, 2], [3, 4])


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0, 1),
        (0, 200_000),
        (56.2, 57.9),
        (-3, 5),
        (0.0001, 0.00011),
        (0, 1e-12),
        (1e6, 1.0000001e6),
    ],
)
def test_ticks_are_a_few_round_numbers_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    slack = (high - low) * 1e-6
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert len({round(second - first, 12) for first, second in itertools.pairwise(found)}) <= 2


def test_numbers_beside_axes_are_short() -> None:
    assert [axis_number(number) for number in (0, 0.03, 57.6, 1626, 388_896, 11_176_512)] == [
        "0",
        "0.03",
        "57.6",
        "1.63k",
        "389k",
        "11.2M",
    ]


def test_curves_stay_within_the_figure_and_go_where_their_values_are() -> None:
    curves = [Curve("a <b>", 0, [10, 20, 30], [1, 3, 2]), Curve("b", 9, [30], [2.5])]
    figure = ET.fromstring(line_chart("Loss", curves))
    svg = figure.find("svg")
    assert svg is not None
    (path,) = (shape for shape in svg.iter("path"))
    xs, ys = numbers(path.attrib["d"])[::2], numbers(path.attrib["d"])[1::2]
    assert xs == sorted(xs)
    assert ys[1] < ys[2] < ys[0]  # downwards in pixels
    assert all(0 <= x <= WIDTH for x in xs)
    (dot,) = (shape for shape in svg.iter("circle"))
    assert "g9 c1 d1" in dot.attrib["class"]
    data = json.loads(svg.attrib["data-chart"])
    assert data["curves"][0] == {"name": "a <b>", "group": 0, "x": [10, 20, 30], "y": [1, 3, 2]}
    assert [title.text for title in svg.iter("title")] == ["a <b>", "b"]


def test_a_constant_curve_and_one_at_step_zero_are_drawn() -> None:
    for curve in (Curve("a", 0, [1, 2], [5, 5]), Curve("a", 0, [0], [0])):
        figure = line_chart("x", [curve])
        assert "nan" not in figure
        ET.fromstring(figure)


def test_points_stand_over_a_logarithmic_axis_and_each_name_once() -> None:
    points = [
        Point(name, "m", 0, x, y, name)
        for name, x, y in (("a", 1e6, 50), ("b", 1e7, 60), ("c", 1e8, 70), ("c", 1e8, 80))
    ]
    figure = ET.fromstring(scatter_chart("Accuracy", points, "parameters"))
    xs = [float(circle.attrib["cx"]) for circle in figure.iter("circle")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    names = [text.text for text in figure.iter("text") if text.attrib["class"].startswith("name")]
    assert sorted(filter(None, names)) == ["a", "b", "c"]
    assert len(list(figure.iter("path"))) == 1  # joins the two of c
