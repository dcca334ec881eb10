"""The figures that compare runs: accuracy and tokens by N, one shared budget, and length by correctness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from bcr.analysis.measures import wilson
from bcr.analysis.report.curves import Curve, over_sizes, plain
from bcr.analysis.report.folder import Record, Results, Run
from bcr.analysis.report.svg import BOTTOM, TOP, Panel, nice_limits, ticks_between

Z = 1.96  # 95 % intervals


@dataclass(frozen=True)
class Table:
    """The numbers behind a figure."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """`panels`: (heading, svg). `caption` says how to read it."""

    id: str
    title: str
    caption: str
    panels: list[tuple[str, Markup]] = field(default_factory=list)
    table: Table | None = None


def colour_of(run: Run) -> str:
    """The CSS variable of a run's colour; one that the page does not know looks like the main run."""
    known = {"base": "base", "bcr": "bcr", "grpo": "grpo", "bcr_tight": "bcr-tight", "same_cap": "same-cap", "penalty": "penalty"}
    return known.get(run.key, "bcr")


def comparison(results: Results) -> Figure | None:
    """Tokens per problem and accuracy by N for every run that was evaluated, and accuracy under one fixed budget."""
    runs = [run for run in results.runs if run.measures]
    if not runs:
        return None
    panels = [
        ("Tokens per problem", by_size(runs, "tokens_per_problem", tokens_interval)),
        ("Accuracy, roomy budget", by_size(runs, "accuracy", accuracy_interval)),
    ]
    shared = results.summary.get("shared_budget")
    if shared:
        panels.append((f"Accuracy, {shared['tokens']} tokens for all N together", shared_budget(runs, shared)))
    head = ["run", "N", "accuracy", "95 % interval", "tokens per problem", "± 95 %", "cut off", "unanswered"]
    rows = [table_row(run, size, cell) for run in runs for size, cell in sorted(run.measures.items())]
    caption = (
        "The same held-out problems at every N, the number of problems in one prompt. Bars are 95 % confidence intervals over problems "
        "(Wilson) and rollouts; they say nothing about another seed. All panels of accuracy share one scale."
    )
    return Figure("by-n", "Accuracy and length by N", caption, panels, Table(head, rows))


def table_row(run: Run, size: int, cell: Record) -> list[str]:
    low, high = accuracy_interval(cell)
    width = Z * cell["tokens_per_problem_se"] if "tokens_per_problem_se" in cell else None
    return [
        run.label,
        str(size),
        f"{cell['accuracy']:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{cell['tokens_per_problem']:.1f}",
        "" if width is None else f"{width:.1f}",
        f"{cell['truncated']:.1%}" if "truncated" in cell else "",
        f"{cell['unanswered']:.1%}" if "unanswered" in cell else "",
    ]


def accuracy_interval(cell: Record) -> tuple[float, float]:
    return wilson(cell["accuracy"], cell["problems"])


def tokens_interval(cell: Record) -> tuple[float, float]:
    half = Z * cell.get("tokens_per_problem_se", 0.0)
    return cell["tokens_per_problem"] - half, cell["tokens_per_problem"] + half


def by_size(runs: Sequence[Run], name: str, interval: Callable[[Record], tuple[float, float]]) -> Markup:
    """One curve a run over N."""
    curves = [
        Curve(run.label, run.title, colour_of(run), [(size, cell[name], interval(cell)) for size, cell in sorted(run.measures.items())])
        for run in runs
    ]
    shares = name == "accuracy"
    limits = (0.0, 1.0) if shares else nice_limits([interval(cell)[1] for run in runs for cell in run.measures.values()])
    return over_sizes(curves, limits, name.replace("_", " ").capitalize(), shares)


def shared_budget(runs: Sequence[Run], shared: Record) -> Markup:
    """Accuracy by N where all N problems together get the same tokens."""

    def point(run: Run, size: int, accuracy: float) -> tuple[float, float, tuple[float, float] | None]:
        problems = run.measures.get(size, {}).get("problems")
        return size, accuracy, wilson(accuracy, problems) if problems else None

    curves = [
        Curve(run.label, run.title, colour_of(run), [point(run, *at) for at in zip(shared["sizes"], shared[run.key], strict=False)])
        for run in runs
        if run.key in shared
    ]
    return over_sizes(curves, (0.0, 1.0), f"Accuracy under {shared['tokens']} shared tokens", shares=True)


def length_by_correctness(results: Results) -> Figure | None:
    """For each run how long its correct answers are, and the others: a pair of points a run, a panel for each N of the transcripts."""
    runs = [run for run in results.runs if any(cell.get("tokens_correct") is not None for cell in run.measures.values())]
    if not runs:
        return None
    every = sorted({size for run in runs for size in run.measures})
    sizes = [size for size in every if size in (1, 3)] or every[:2]
    cells = [run.measures[size] for run in runs for size in sizes if size in run.measures]
    lengths = [cell[name] for cell in cells for name in ("tokens_correct", "tokens_wrong") if cell.get(name) is not None]
    limits = nice_limits(lengths)
    panels = [(f"N = {size}", correctness_panel([run for run in runs if size in run.measures], size, limits)) for size in sizes]
    rows = [
        [run.label, str(size), *(number(run.measures[size].get(name)) for name in ("tokens_correct", "tokens_wrong"))]
        for run in runs
        for size in sorted(run.measures)
    ]
    caption = (
        "Mean tokens of the segments of correctly answered problems (filled) and of all other problems (hollow). Where wrong answers are "
        "the longer ones, length is no sign of thinking well; where a policy has no wrong answers there is no hollow point."
    )
    return Figure("correctness", "Length by correctness", caption, panels, Table(["run", "N", "tokens, correct", "tokens, other"], rows))


def correctness_panel(runs: Sequence[Run], size: int, limits: tuple[float, float]) -> Markup:
    row = 30
    panel = Panel(limits, (0.0, float(len(runs))), left=84, height=BOTTOM + TOP + row * len(runs))
    panel.axes(ticks_between(*limits), [], "tokens of a problem's segments", plain)
    said = []
    for index, run in enumerate(runs):
        y, colour, cell = len(runs) - index - 0.5, colour_of(run), run.measures[size]
        correct, other = cell.get("tokens_correct"), cell.get("tokens_wrong")
        panel.line([(limits[0], y), (limits[1], y)], "rule", kind="row")
        panel.text(76, panel.y(y) + 4.5, run.label, anchor="end", kind="label", colour=colour)
        if correct is not None and other is not None:
            panel.line([(correct, y), (other, y)], colour)
        if other is not None:
            panel.dot(other, y, colour, f"{run.title}, not correct: {other:.1f} tokens", hollow=True)
        if correct is not None:
            panel.dot(correct, y, colour, f"{run.title}, correct: {correct:.1f} tokens")
        said.append(f"{run.label}: {number(correct)} when correct, {number(other)} otherwise")
    return panel.svg(f"Tokens at N = {size}. {'; '.join(said)}.")


def number(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"
