"""Lines over a common x axis as inline SVG, in the colours of the page they stand in, light or dark."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeGuard

from markupsafe import Markup

from ..text import for_html

_POINTS = 240  # of a line; more are not seen
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 34  # room around the plot, in units of the drawing


class Line(NamedTuple):
    """A line, or marks where the points are few; ``low`` and ``high``, if given, bound a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]  # None leaves a gap
    colour: int = 0  # one of the page's eight
    marks: bool = False
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


class Axis(NamedTuple):
    """What a chart says of its axes."""

    x: str
    y: str
    log: bool = False  # the y axis
    percent: bool = False


def chart(lines: Iterable[Line], axis: Axis, size: tuple[int, int] = (440, 260)) -> Markup:
    """Draw lines; Markup("") if none has a finite point."""
    lines = list(lines)
    values = [v for line in lines for some in (line.y, line.low, line.high) for v in some if _drawn(v, axis)]
    places = [x for line in lines for x in line.x if math.isfinite(x)]
    if not values or not places:
        return Markup("")
    y = _Scale(values, (size[1] - _BOTTOM, _TOP), axis.log)
    x = _Scale(places, (_LEFT, size[0] - _RIGHT), log=False)
    parts = [*_grid(x, y, axis, size)]
    for line in lines:
        if line.low:
            parts.append(_band(line, x, y, axis))
        parts += _line(line, x, y, axis)
    label = for_html(f"{axis.y} over {axis.x}: {', '.join(line.name for line in lines)}")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _drawn(value: float | None, axis: Axis) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and (value > 0 or not axis.log)


class _Scale:
    """From values to places on an axis, with round numbers for its ticks."""

    def __init__(self, values: Sequence[float], ends: tuple[float, float], log: bool) -> None:
        low, high = min(values), max(values)
        self.log = log
        if log:
            low, high = math.log10(low), math.log10(high)
        room = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
        self._low, self._high = (low - room, high + room) if log or ends[0] > ends[1] else (low, high or 1.0)
        if self._high - self._low < 1e-200:  # one value, or two that nothing can tell apart
            self._high += max(1.0, abs(self._high))
        self._ends = ends

    def __call__(self, value: float) -> float:
        share = ((math.log10(value) if self.log else value) - self._low) / (self._high - self._low)
        return round(self._ends[0] + share * (self._ends[1] - self._ends[0]), 1)

    def ticks(self) -> list[float]:
        """Four to eight round values."""
        if self.log and self._high - self._low > 1:
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            steps = (1,) if len(decades) > 4 else (1, 2, 5)
            marks = [step * 10.0**decade for decade in decades for step in steps]
            return [mark for mark in marks if mark > 0 and self._low <= math.log10(mark) <= self._high]
        low, high = (10**self._low, 10**self._high) if self.log else (self._low, self._high)
        unit = 10.0 ** math.floor(math.log10((high - low) / 4))
        step = next(unit * times for times in (1, 2, 5, 10) if (high - low) / (unit * times) <= 6)
        first = math.ceil(low / step - 1e-9)
        marks = [float(f"{step * n:.12g}") for n in range(first, math.floor(high / step + 1e-9) + 1)]
        return [mark for mark in marks if mark > 0 or not self.log]


def _grid(x: _Scale, y: _Scale, axis: Axis, size: tuple[int, int]) -> Iterable[str]:
    width, height = size
    for value in y.ticks():
        at = y(value)
        shown = f"{100 * value:g}" if axis.percent else f"{value:g}"
        yield f'<path class="g" d="M{_LEFT} {at}H{width - _RIGHT}"/>'
        yield f'<text x="{_LEFT - 5}" y="{at + 3.5}" text-anchor="end">{shown}</text>'
    for value in x.ticks():
        yield f'<text x="{x(value)}" y="{height - _BOTTOM + 14}" text-anchor="middle">{value:g}</text>'
    middle = (_LEFT + width - _RIGHT) / 2
    yield f'<text x="{middle}" y="{height - 5}" text-anchor="middle">{for_html(axis.x)}</text>'


def _line(line: Line, x: _Scale, y: _Scale, axis: Axis) -> Iterable[str]:
    """The runs of points without a gap; a point alone, and every point of a line with marks, is a dot."""
    runs: list[list[str]] = [[]]
    points = list(zip(line.x, line.y, strict=True))
    every = max(1, -(-len(points) // _POINTS))
    for at, value in [*points[:-1:every], *points[-1:]]:
        if value is not None and _drawn(value, axis):
            runs[-1].append(f"{x(at)} {y(value)}")
        elif runs[-1]:
            runs.append([])
    title = f"<title>{for_html(line.name)}</title>"
    for run in filter(None, runs):
        if len(run) > 1:
            yield f'<path class="l c{line.colour % 8}" d="M{"L".join(run)}">{title}</path>'
        if line.marks or len(run) == 1:
            for point in run:
                across, down = point.split()
                yield f'<circle class="c{line.colour % 8}" cx="{across}" cy="{down}" r="3">{title}</circle>'


def _band(line: Line, x: _Scale, y: _Scale, axis: Axis) -> str:
    rows = zip(line.x, line.low, line.high, strict=True)
    kept = [(at, low, high) for at, low, high in rows if _drawn(low, axis) and _drawn(high, axis)]
    there = [f"{x(at)} {y(high)}" for at, _, high in kept]
    back = [f"{x(at)} {y(low)}" for at, low, _ in reversed(kept)]
    return f'<path class="b c{line.colour % 8}" d="M{"L".join(there + back)}Z"/>' if kept else ""
