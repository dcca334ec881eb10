"""A small canvas for figures inside the page: axes, lines, bands, points and labels as SVG.

Written by hand rather than by matplotlib so that the page's colours, dark or light, and its fonts apply, and text stays text.
Colours are names of the page's CSS variables; everything that comes from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 380, 236
TOP, BOTTOM, LEFT = 12, 36, 46
LINE_HEIGHT = 15

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Values low..high to pixels start..stop, linearly or by logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.stop - self.start) * ((at - low) / (high - low) if high > low else 0.5)


def nice_limits(values: Sequence[float], floor: float = 0.0) -> Point:
    """From `floor` to a round number above every value."""
    top = max([value for value in values if math.isfinite(value)], default=floor + 1)
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(floor, max(top, floor + 1e-6))
    return floor, float(ticks[-1])


def ticks_between(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    found = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
    return [float(tick) for tick in found if low - 1e-9 <= tick <= high + 1e-9]


class Panel:
    """One set of axes. Give the limits first, then draw from back to front, then take `svg()`."""

    def __init__(
        self, x_limits: Point, y_limits: Point, right: int = 16, left: int = LEFT, height: int = HEIGHT, x_log: bool = False
    ) -> None:
        self.height, self.left, self.right = height, left, WIDTH - right
        self.x = Scale(*x_limits, left, self.right, x_log)
        self.y = Scale(*y_limits, height - BOTTOM, TOP)
        self.parts: list[str] = []

    def axes(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_format: Callable[[float], str]) -> None:
        for tick in y_ticks:
            y = self.y(tick)
            self.parts.append(f'<line class="rule" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.text(self.left - 7, y + 4.5, y_format(tick), anchor="end", kind="tick")
        for tick in x_ticks:
            self.text(self.x(tick), self.height - BOTTOM + 17, f"{tick:g}", anchor="middle", kind="tick")
        self.text((self.left + self.right) / 2, self.height - 3, x_label, anchor="middle", kind="name")

    def band(self, lower: Sequence[Point], upper: Sequence[Point], colour: str) -> None:
        """The area between two lines over the same x: a confidence band."""
        corners = " ".join(self.at(*point) for point in [*upper, *reversed(lower)])
        self.parts.append(f'<polygon class="band" style="--c:var(--{colour})" points="{corners}"/>')

    def line(self, points: Sequence[Point], colour: str, kind: str = "line", shift: float = 0) -> None:
        places = " ".join(f"{self.x(x) + shift:.1f},{self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{kind}" style="--c:var(--{colour})" points="{places}"/>')

    def interval(self, x: float, low: float, high: float, colour: str, shift: float = 0) -> None:
        """A confidence interval, upright at x, moved by `shift` pixels so that neighbours stay apart."""
        place = self.x(x) + shift
        ends = f'x1="{place:.1f}" x2="{place:.1f}" y1="{self.y(low):.1f}" y2="{self.y(high):.1f}"'
        self.parts.append(f'<line class="interval" style="--c:var(--{colour})" {ends}/>')

    def dot(self, x: float, y: float, colour: str, says: str, shift: float = 0, hollow: bool = False) -> None:
        """A point; `says` is shown where the pointer rests on it."""
        kind = "dot hollow" if hollow else "dot"
        place = f'cx="{self.x(x) + shift:.1f}" cy="{self.y(y):.1f}" r="4"'
        self.parts.append(f'<circle class="{kind}" style="--c:var(--{colour})" {place}><title>{escape(says)}</title></circle>')

    def stretch(self, start: float, stop: float, label: str, kind: str = "stage", at_foot: bool = False) -> None:
        """A part of the x axis, shaded, with its name in one line, word by word, or not at all where it is too narrow."""
        left, right = self.x(start), self.x(stop)
        box = f'x="{left:.1f}" y="{TOP}" width="{max(0.0, right - left):.1f}" height="{self.height - BOTTOM - TOP}"'
        self.parts.append(f'<rect class="{kind}" {box}/>')
        words = [label] if right - left > 6.2 * len(label) else label.split()
        if right - left > 6.2 * max(map(len, words)):
            for row, word in enumerate(words):
                above = 13 * (len(words) - row - 1)
                self.text(left + 5, self.height - BOTTOM - 7 - above if at_foot else TOP + 13 * (row + 1), word, kind="stage-name")

    def leader(self, x: float, y: float, place: float, colour: str) -> None:
        """A thin line from a point to the pixel row `place` at the right edge, where its name stands."""
        ends = f'x1="{self.x(x):.1f}" y1="{self.y(y):.1f}" x2="{self.right + 10:.1f}" y2="{place:.1f}"'
        self.parts.append(f'<line class="leader" style="--c:var(--{colour})" {ends}/>')

    def tick(self, x: float, y: float, colour: str) -> None:
        """A short upright mark: one seed among several."""
        ends = f'x1="{self.x(x):.1f}" x2="{self.x(x):.1f}" y1="{self.y(y) - 6:.1f}" y2="{self.y(y) + 6:.1f}"'
        self.parts.append(f'<line class="interval" style="--c:var(--{colour})" {ends}/>')

    def upright(self, x: float, kind: str = "change") -> None:
        place = self.x(x)
        self.parts.append(f'<line class="{kind}" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{self.height - BOTTOM}"/>')

    def end_labels(self, labels: Sequence[tuple[float, str, str]]) -> None:
        """Names beside the right ends of lines: (y, name, colour), moved apart where they would lie on each other."""
        order = sorted(labels, key=lambda label: self.y(label[0]))
        places = spread([self.y(y) for y, _, _ in order], LINE_HEIGHT, TOP + 4, self.height - BOTTOM)
        for place, (_, name, colour) in zip(places, order, strict=True):
            self.text(self.right + 11, place + 4.5, name, colour=colour, kind="label")

    def text(self, x: float, y: float, words: str, anchor: str = "start", kind: str = "tick", colour: str = "") -> None:
        style = f' style="--c:var(--{colour})"' if colour else ""
        self.parts.append(f'<text class="{kind}"{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def at(self, x: float, y: float) -> str:
        return f"{self.x(x):.1f},{self.y(y):.1f}"

    def svg(self, description: str) -> Markup:
        """The figure; `description` says in words what it shows, for those who cannot see it."""
        inside = "".join(self.parts)
        return Markup(f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(description)}">{inside}</svg>')


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places, moved as little as a single pass each way needs so that neighbours are `gap` apart and all lie in low..high.

    >>> spread([10.0, 11.0, 40.0], 5, 0, 50)
    [10.0, 15.0, 40.0]
    >>> spread([48.0, 49.0], 5.0, 0.0, 50.0)
    [45.0, 50.0]
    """
    result = list(places)
    for index in range(len(result)):
        result[index] = max(result[index], low if index == 0 else result[index - 1] + gap)
    for index in reversed(range(len(result))):
        result[index] = min(result[index], high if index == len(result) - 1 else result[index + 1] - gap)
    return result
