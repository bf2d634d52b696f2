"""Curves as inline SVG, for a page that stands alone and knows no matplotlib.

A chart is drawn `WIDTH` × `HEIGHT` units, about the pixels that a phone gives it; colours come from the page's style
sheet by the classes `line-0`, `line-1`, … .
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from warm_jax.analysis.markup import Html, join, tag

WIDTH, HEIGHT = 400, 244
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 44  # margins around the plot
POINTS = 500  # of a line; more are averaged in groups
COLOURS = 6  # the classes that the style sheet has
_HOVER = 60  # columns that tell their values under the pointer
_LARGEST = 1e100  # what is larger, or on a log axis smaller than its inverse, is taken for damage


class Line(NamedTuple):
    """One curve; y is None where there is no finite value."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


def number(value: object) -> float | None:
    """A number as float; None for anything else, a bool, what is not finite and what is beyond 1e100 too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= _LARGEST else None  # False of a nan


def thin(line: Line, most: int = POINTS) -> Line:
    """At most `most` points: means over groups of as many neighbours, of what is finite in them."""
    size = -(-len(line.x) // most)
    if size <= 1:
        return line
    x, y = [], []
    for start in range(0, len(line.x), size):
        finite = [value for value in line.y[start : start + size] if value is not None]
        x.append(sum(line.x[start : start + size]) / len(line.x[start : start + size]))
        y.append(sum(finite) / len(finite) if finite else None)
    return Line(line.name, x, y)


@dataclasses.dataclass(frozen=True)
class Axis:
    """An interval of values and where they stand on it, from 0 (low) to 1 (high)."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Linear, or linear in log(value)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Three to eight round values in the interval: 1, 2 or 5 times a power of ten, evenly on the axis if linear."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1,), (1, 3), (1, 2, 5)):
                found = [f * 10.0**d for d in decades for f in factors if self.low <= f * 10.0**d <= self.high]
                if len(found) >= 3:
                    return found[:: -(-len(found) // 7)]
        rough = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def axis(values: Sequence[float], log: bool = False, from_zero: bool = False) -> Axis:
    """An axis that holds `values` (all positive if `log`), with a little room; never of no length."""
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** 0.04 if high > low else 2.0
        return Axis(low / room, high * room, log=True)
    low = min(low, 0.0) if from_zero else low
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return Axis(low if from_zero and low == 0 else low - room, high + room)


def path(line: Line, across: Axis, up: Axis, box: tuple[int, int, int, int]) -> str:
    """The `d` of an SVG path in a box (left, top, width, height), a piece for each run without gaps."""
    left, top, width, height = box
    pieces, run = [], []
    for x, y in [*zip(line.x, line.y, strict=True), (0.0, None)]:
        if y is not None:
            run.append(f"{left + across.place(x) * width:.2f},{top + (1 - up.place(y)) * height:.2f}")
        elif run:
            pieces.append(f"M{' L'.join(run)}" + ("h0" if len(run) == 1 else ""))  # a dot, with round ends
            run = []
    return " ".join(pieces)


def label(value: float) -> str:
    """A number for an axis, in five characters or so: 0.002, 40k, 1.5M, 1e-07."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if size * (10 if letter == "k" else 1) <= abs(value) < 1e9:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}" if abs(value) < 1e-4 else f"{value:.6g}"


def shown(value: float | None) -> str:
    """A number for reading, four digits."""
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clean(lines: Sequence[Line], log: bool) -> list[Line]:
    """Lines of at most POINTS, without those that have nothing to draw; a log axis has no place for y ≤ 0."""
    drawn = [
        Line(name, x, [v if v is not None and (not log or v > 1 / _LARGEST) else None for v in y])
        for name, x, y in lines
    ]
    return [thin(line) for line in drawn if any(v is not None for v in line.y)]


def _scale(across: Axis, up: Axis, x_label: str, y_label: str) -> Html:
    """Grid lines, ticks and the names of both axes."""
    width, height, parts = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM, []
    for value in up.ticks():
        y = f"{TOP + (1 - up.place(value)) * height:.2f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", label(value), x=LEFT - 6, y=y, dy="0.35em", text_anchor="end"))
    for value in across.ticks():
        x = f"{LEFT + across.place(value) * width:.2f}"
        parts.append(tag("line", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="tick"))
        parts.append(tag("text", label(value), x=x, y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="tick"))
    parts.append(tag("text", y_label, x=0, y=11))
    parts.append(tag("text", x_label, x=WIDTH - RIGHT, y=HEIGHT - BOTTOM + 34, text_anchor="end"))
    return join(*parts)


def _tips(lines: Sequence[Line], across: Axis, x_label: str) -> Html:
    """Invisible columns over the plot that tell x and every line's y there."""
    width, longest = WIDTH - LEFT - RIGHT, max(lines, key=lambda line: len(line.x))
    count = min(_HOVER, len(longest.x))
    chosen = [round(i * (len(longest.x) - 1) / max(1, count - 1)) for i in range(count)]
    values = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    middles = [LEFT + across.place(longest.x[i]) * width for i in chosen]
    edges = [float(LEFT), *((a + b) / 2 for a, b in itertools.pairwise(middles)), float(WIDTH - RIGHT)]
    parts = []
    for i, (start, end) in zip(chosen, itertools.pairwise(edges), strict=True):
        x = longest.x[i]
        there = [f"{line.name} {shown(y.get(x))}" for line, y in zip(lines, values, strict=True)]
        said = tag("title", f"{x_label} {x:g}: {', '.join(there)}")
        where = {
            "x": f"{start:.2f}",
            "width": f"{max(0.0, end - start):.2f}",
            "y": TOP,
            "height": HEIGHT - TOP - BOTTOM,
        }
        parts.append(tag("rect", said, **where, class_="tip"))
    return join(*parts)


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    y_label: str,
    x_label: str = "step",
    log: bool = False,
    from_zero: bool = False,
) -> Html:
    """A figure: title, a legend with each line's last value, and the curves. Empty where nothing is finite.

    With `log` the y axis is logarithmic and has gaps where y ≤ 0; `from_zero` lets a linear one begin at 0.
    """
    drawn = _clean(lines, log)
    if not drawn:
        return Html("")
    across = axis([x for line in drawn for x in line.x])
    up = axis([y for line in drawn for y in line.y if y is not None], log, from_zero)
    box = (LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    curves, legend, said = [], [], []
    for i, line in enumerate(drawn):
        last = next(y for y in reversed(line.y) if y is not None)
        curves.append(tag("path", d=path(line, across, up, box), class_=f"line line-{i % COLOURS}"))
        name = line.name if len(drawn) > 1 else "last"  # the title says what a single line is
        legend.append(tag("li", name, " ", tag("b", shown(last)), class_=f"key-{i % COLOURS}"))
        said.append(f"{line.name} ends at {shown(last)}")
    heading = tag("figcaption", tag("strong", title), tag("ul", *legend, class_="legend"))
    summary = f"{title} by {x_label}{', logarithmic' if log else ''}: {'; '.join(said)}"
    drawing = join(_scale(across, up, x_label, y_label), *curves, _tips(drawn, across, x_label))
    return tag("figure", heading, tag("svg", drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=summary))


def spark(line: Line, colour: int = 0) -> Html:
    """A curve the size of a word, logarithmic, of the class `line-<colour>`; empty where nothing is positive."""
    drawn = _clean([line], log=True)
    if not drawn:
        return Html("")
    across, up = axis(drawn[0].x), axis([y for y in drawn[0].y if y is not None], log=True)
    curve = tag("path", d=path(thin(drawn[0], 60), across, up, (2, 2, 86, 18)), class_=f"line line-{colour}")
    return tag("svg", curve, viewBox="0 0 90 22", class_="spark", role="img", aria_label=f"{line.name} over time")
