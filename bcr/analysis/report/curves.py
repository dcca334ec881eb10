"""Curves of several policies over N, or over a budget, in one panel: points with intervals, and a name at the end of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from bcr.analysis.report.svg import Panel, ticks_between

BESIDE = 96  # pixels for names beside the right ends of curves
APART = 4  # pixels between neighbouring curves, so that their intervals stay apart


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def plain(value: float) -> str:
    return f"{value:g}"


def exact_percent(share: float) -> str:
    return f"{share:.1%}"


def tokens(value: float) -> str:
    return f"{value:.1f} tokens"


@dataclass(frozen=True)
class Curve:
    """`points`: (x, value, the interval around it where there is one), by rising x. `colour`: a CSS variable of the page."""

    label: str
    title: str
    colour: str
    points: Sequence[tuple[float, float, tuple[float, float] | None]]


def over_sizes(curves: Sequence[Curve], limits: tuple[float, float], what: str, shares: bool, beside: int = BESIDE) -> Markup:
    """Curves over N. `what` begins the words that describe the figure; `shares`: the values are shares, else tokens."""
    sizes = sorted({x for curve in curves for x, _, _ in curve.points})
    panel = axes_by_size(sizes, limits, percent if shares else plain, beside)
    draw(panel, curves, "N = {:g}", exact_percent if shares else tokens, apart=APART)
    return panel.svg(f"{what} at N = {', '.join(f'{size:g}' for size in sizes)}. {in_words(curves, shares)}.")


def axes_by_size(sizes: Sequence[float], limits: tuple[float, float], shown: Callable[[float], str], beside: int) -> Panel:
    """N on a logarithmic axis with a little room on both sides, and `beside` pixels for names."""
    panel = Panel((sizes[0] / 1.15, sizes[-1] * 1.15), limits, right=beside, x_log=True)
    panel.axes(sizes, ticks_between(*limits), "N: problems in one prompt", shown)
    return panel


def draw(panel: Panel, curves: Sequence[Curve], where: str, said: Callable[[float], str], apart: float = 0) -> None:
    """`where` names the x of a point, and `said` its value, where the pointer rests on it."""
    for index, curve in enumerate(curves):
        shift = apart * (index - (len(curves) - 1) / 2)
        panel.line([(x, value) for x, value, _ in curve.points], curve.colour, shift=shift)
        for x, value, interval in curve.points:
            if interval is not None:
                panel.interval(x, *interval, curve.colour, shift)
            panel.dot(x, value, curve.colour, f"{curve.title}, {where.format(x)}: {said(value)}", shift)
    panel.end_labels([(curve.points[-1][1], curve.label, curve.colour) for curve in curves])


def in_words(curves: Sequence[Curve], shares: bool) -> str:
    """The values of every curve, for those who cannot see them."""
    shown = "{:.1%}" if shares else "{:.1f}"
    return "; ".join(f"{curve.label}: {', '.join(shown.format(value) for _, value, _ in curve.points)}" for curve in curves)
