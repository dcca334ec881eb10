"""The panels of a study: accuracy against tokens, both over N, the difference to each control, and accuracy under token budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from bcr.analysis.report.curves import Curve, draw, exact_percent, in_words, over_sizes, percent, plain
from bcr.analysis.report.svg import BOTTOM, LINE_HEIGHT, TOP, Panel, nice_limits, spread, ticks_between
from bcr.analysis.study_findings import direction, signed

Summary = Mapping[str, Any]

MAIN, OTHERS = "bcr", ("grpo", "same-cap", "bcr-tight", "penalty")  # colours of the page: the first cell's, and those of the others in turn
ROW, NAMES = 26, 128  # pixels: the height of a row, the room for names


def colour_of(summary: Summary, name: str) -> str:
    if name == "base":
        return "base"
    place = [other for other in summary["cells"] if other != "base"].index(name)
    return OTHERS[(place - 1) % len(OTHERS)] if place else MAIN


def accuracy_against_tokens(summary: Summary) -> Markup:
    """One point a cell at the smallest N, with its 95 % intervals over problems both ways; names at the right, joined to their points."""
    size = str(summary["measurement"]["sizes"][0])
    cells = {name: cell["sizes"][size] for name, cell in summary["cells"].items()}
    tokens = [max(0.5, at["tokens"][0]) for at in cells.values()]
    low = 0.0 if min(at["accuracy"][1] for at in cells.values()) < 0.5 else 0.5
    height = max(260, BOTTOM + TOP + LINE_HEIGHT * (len(cells) + 1))
    panel = Panel((min(tokens) / 1.2, max(tokens) * 1.2), (low, 1.0), right=NAMES, height=height, x_log=True)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 40, 80, 160) if min(tokens) / 1.2 <= tick <= max(tokens) * 1.2]
    panel.axes(ticks, ticks_between(low, 1.0), f"tokens per problem at N = {size}", percent)
    order = sorted(cells, key=lambda name: -cells[name]["accuracy"][0])
    places = spread([panel.y(cells[name]["accuracy"][0]) for name in order], LINE_HEIGHT, TOP + 4, height - BOTTOM)
    said = []
    for name, place in zip(order, places, strict=True):
        at, colour, label = cells[name], colour_of(summary, name), summary["cells"][name]["label"]
        (x, left, right), (y, below, above) = at["tokens"], at["accuracy"]
        x = max(0.5, x)
        panel.leader(x, y, place, colour)
        panel.interval(x, max(low, below), above, colour)
        panel.line([(max(0.5, left), y), (max(0.5, right), y)], colour, kind="thin")
        panel.dot(x, y, colour, f"{summary['cells'][name]['title']}: {y:.1%} in {x:.1f} tokens")
        panel.text(panel.right + 14, place + 4.5, label, kind="label", colour=colour)
        said.append(f"{label}: {y:.1%} in {x:.1f}")
    return panel.svg(f"Accuracy and tokens per problem at N = {size}. {'; '.join(said)}.")


def by_size(summary: Summary, names: Sequence[str], quantity: str) -> Markup:
    """`quantity` (accuracy or tokens) of some cells over N, with the intervals over problems."""
    sizes, cells = summary["measurement"]["sizes"], summary["cells"]

    def point(name: str, size: int) -> tuple[float, float, tuple[float, float]]:
        value, low, high = cells[name]["sizes"][str(size)][quantity]
        return size, value, (low, high)

    curves = [
        Curve(cells[name]["label"], cells[name]["title"], colour_of(summary, name), [point(name, size) for size in sizes]) for name in names
    ]
    shares = quantity == "accuracy"
    limits = (
        (0.0, 1.0) if shares else nice_limits([point(name, size)[2][1] for name in cells for size in sizes])
    )  # one scale for all panels
    return over_sizes(curves, limits, quantity.capitalize(), shares, NAMES)


def differences(summary: Summary, quantity: str, size: str) -> Markup:
    """A row for each comparison: the paired difference with its interval, filled where it is shown, and a small dot for every seed."""
    scale = 1.0 if quantity == "tokens" else 100.0
    found = [(comparison, comparison["sizes"][size][quantity]) for comparison in summary["compare"]]
    reach = [scale * number for _, at in found for number in (*at["difference"], *at["by_seed"])]
    low, high = min([0.0, *reach]), max([0.0, *reach])
    margin = 0.05 * (high - low or 1.0)
    panel = Panel((low - margin, high + margin), (0.0, float(len(found))), left=176, height=BOTTOM + TOP + ROW * len(found))
    unit = "tokens per problem" if quantity == "tokens" else "points of accuracy"
    panel.axes(ticks_between(low - margin, high + margin), [], f"{unit} at N = {size}", plain)
    panel.upright(0.0)
    said = []
    for index, (comparison, at) in enumerate(found):
        one, control = (summary["cells"][comparison[side]]["label"] for side in ("one", "control"))
        y, colour = len(found) - index - 0.5, colour_of(summary, comparison["control"])
        value, below, above = (scale * number for number in at["difference"])
        panel.text(168, panel.y(y) + 4.5, f"{one} − {control}", anchor="end", kind="label", colour=colour)
        panel.line([(below, y), (above, y)], colour, kind="thin")
        for seed in at["by_seed"]:
            panel.tick(scale * seed, y, colour)
        panel.dot(value, y, colour, f"{one} less {control}: {signed(value)} [{signed(below)}, {signed(above)}]", hollow=not direction(at))
        said.append(f"{one} less {control}: {signed(value)} from {signed(below)} to {signed(above)}")
    return panel.svg(f"Differences of {unit} at N = {size}. {'; '.join(said)}.")


def under_budgets(summary: Summary, names: Sequence[str]) -> Markup:
    """Accuracy of some cells at the smallest N when their completions are cut to each budget."""
    size, roomy = str(summary["measurement"]["sizes"][0]), summary["measurement"]["roomy"]
    budgets = [budget for budget in summary["measurement"]["cut_at"] if budget <= roomy]
    panel = Panel((budgets[0] / 1.1, budgets[-1] * 1.1), (0.0, 1.0), right=NAMES, x_log=True)
    shown = [tick for tick in budgets if tick in (10, 12, 18, 27, 30, 40, 60, 110) or tick == budgets[-1]]
    spaced = [tick for tick, following in zip(shown, [*shown[1:], None], strict=True) if following is None or following > 1.3 * tick]
    panel.axes(spaced, ticks_between(0.0, 1.0), f"token budget at N = {size}", percent)

    def point(cell: Mapping[str, Any], budget: int) -> tuple[int, float, None]:
        return budget, cell["sizes"][size]["cut"][str(budget)], None

    cells = {name: summary["cells"][name] for name in names}
    curves = [
        Curve(cell["label"], cell["title"], colour_of(summary, name), [point(cell, budget) for budget in budgets])
        for name, cell in cells.items()
    ]
    draw(panel, curves, "{:g} tokens", exact_percent)
    return panel.svg(f"Accuracy under {', '.join(map(str, budgets))} tokens. {in_words(curves, shares=True)}.")


def training_tokens(summary: Summary) -> Markup:
    """A row for each cell: millions of tokens that training has sampled."""
    trained = {name: cell for name, cell in summary["cells"].items() if cell["training"]}
    limits = nice_limits([cell["training"]["tokens"] / 1e6 for cell in trained.values()])
    panel = Panel(limits, (0.0, float(len(trained))), left=NAMES, height=BOTTOM + TOP + ROW * len(trained))
    panel.axes(ticks_between(*limits), [], "million tokens sampled in training", plain)
    said = []
    for index, (name, cell) in enumerate(trained.items()):
        y, colour, millions = len(trained) - index - 0.5, colour_of(summary, name), cell["training"]["tokens"] / 1e6
        panel.text(NAMES - 8, panel.y(y) + 4.5, cell["label"], anchor="end", kind="label", colour=colour)
        panel.line([(0.0, y), (millions, y)], colour)
        panel.dot(millions, y, colour, f"{cell['title']}: {millions:.2f} million tokens")
        said.append(f"{cell['label']}: {millions:.2f} million")
    return panel.svg(f"Tokens sampled in training. {'; '.join(said)}.")
