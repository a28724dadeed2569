"""Charts: every finite point is inside the drawing, whatever the numbers are, and names stay text."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gammabeta.pages.chart import Axis, Line, chart

NUMBERS = st.one_of(st.none(), st.floats(-1e30, 1e30), st.just(math.nan), st.just(math.inf))


@settings(deadline=None, max_examples=150)
@example(points=[(0.0, 1.0), (5e-324, 2.0)], log=False, percent=False)
@given(
    points=st.lists(st.tuples(st.floats(0, 1e6), NUMBERS), max_size=400),
    log=st.booleans(),
    percent=st.booleans(),
)
def test_any_numbers(points: list[tuple[float, float | None]], log: bool, percent: bool) -> None:
    x, y = [at for at, _ in points], [value for _, value in points]
    drawn = chart([Line("a", x, y, marks=True), Line("b", x, y, low=y, high=y)], Axis("x", "y", log, percent))
    seen = [v for v in y if v is not None and math.isfinite(v) and (v > 0 or not log)]
    assert bool(drawn) == bool(seen)
    if drawn:
        svg = ET.fromstring(drawn)
        width, height = map(float, svg.attrib["viewBox"].split()[2:])
        for path in svg.iter("path"):
            if "g" not in path.attrib["class"]:
                places = [float(number) for number in re.findall(r"-?[\d.]+", path.attrib["d"])]
                assert all(0 <= at <= width for at in places[::2])
                assert all(0 <= at <= height for at in places[1::2])


def test_the_ends_of_a_line_are_where_its_values_are() -> None:
    svg = ET.fromstring(chart([Line("a", [0, 1, 2], [0.0, 5.0, 10.0])], Axis("epochs", "loss")))
    (line,) = [path for path in svg.iter("path") if "l" in path.attrib["class"].split()]
    places = [tuple(map(float, pair.split())) for pair in line.attrib["d"][1:].split("L")]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert places[1][1] == pytest.approx((places[0][1] + places[2][1]) / 2, abs=0.11)
    assert places[0][1] > places[2][1]  # up is more
    marks = {text.text for text in svg.iter("text")}
    assert {"0", "10", "epochs"} <= marks


def test_a_gap_parts_a_line_and_names_are_text() -> None:
    svg = chart([Line("<b>\x1b", [0, 1, 2, 3, 4], [1.0, 2.0, None, 2.0, 1.0])], Axis("<i>", "y"))
    tree = ET.fromstring(svg)
    assert len([path for path in tree.iter("path") if "l" in path.attrib["class"].split()]) == 2
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert r"&lt;b&gt;\x1b" in svg
