"""Pictures of results (matplotlib, no display needed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {
    "base": "#9aa0a6",
    "bcr": "#0b6e4f",
    "grpo": "#1a73e8",
    "bcr_tight": "#63b77c",
    "same_cap": "#e8a100",
    "penalty": "#c5221f",
}


def before_and_after(summary: Mapping[str, Any], sizes: Sequence[int], file: Path) -> None:
    """Base against BCR by N: tokens per problem and accuracy at a roomy budget, accuracy under one shared budget. With more runs, a panel
    of all at the smallest N. Bars: 95 %."""
    others = [name for name in COLOURS if name in summary]
    count = 4 if len(others) > 2 else 3
    figure = Figure(figsize=(4 * count, 4), layout="constrained")
    panels = figure.subplots(1, count)
    bars(panels[0], sizes, summary, "tokens_per_problem", 1.0)
    panels[0].set_title("Tokens per problem")
    bars(panels[1], sizes, summary, "accuracy", 100.0)
    panels[1].set(title="Accuracy, budget roomy", ylabel="%", ylim=(0, 105))
    shared = summary["shared_budget"]
    for name, label in (("base", "base"), ("bcr", "BCR")):
        values = [100 * value for value in shared[name]]
        panels[2].plot(list(map(str, sizes)), values, "o-", color=COLOURS[name], label=label, linewidth=2)
    panels[2].set(title=f"Accuracy, {shared['tokens']} tokens shared by all N", ylabel="%", ylim=(0, 105))
    panels[2].legend(frameon=False)
    for axes in panels[:3]:
        axes.set_xlabel("N: problems in one prompt")
    if count == 4:
        every_run(panels[3], summary, others, str(min(sizes)))
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def every_run(axes: Axes, summary: Mapping[str, Any], names: Sequence[str], one: str) -> None:
    """Accuracy against tokens per problem of every run at one N: up and to the left is better."""
    for name in names:
        cell = summary[name][one]
        point = (cell["tokens_per_problem"], 100 * cell["accuracy"])
        axes.errorbar(*point, yerr=196 * cell["accuracy_se"], fmt="o", color=COLOURS[name], label=summary["runs"][name]["title"], capsize=2)
    axes.set(title=f"Every run at N = {one}", xlabel="tokens per problem", ylabel="accuracy, %", ylim=(0, 105))
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8, loc="center right")


def bars(axes: Axes, sizes: Sequence[int], summary: Mapping[str, Any], name: str, scale: float) -> None:
    """Two bars for each N, with their values written on them."""
    for offset, run in ((-0.2, "base"), (0.2, "bcr")):
        cells = [summary[run][str(size)] for size in sizes]
        values, errors = ([scale * cell[key] for cell in cells] for key in (name, f"{name}_se"))
        places = [index + offset for index in range(len(sizes))]
        drawn = axes.bar(places, values, 0.38, color=COLOURS[run], yerr=[1.96 * error for error in errors], ecolor="#555555")
        axes.bar_label(drawn, fmt="%.0f", fontsize=8, label_type="center", color="white")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
