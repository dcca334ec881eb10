"""Pictures of results (matplotlib, no display needed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BASE, BCR = "#9aa0a6", "#0b6e4f"


def before_and_after(
    base: Mapping[str, Any],
    bcr: Mapping[str, Any],
    sizes: Sequence[int],
    base_fixed: Sequence[float],
    bcr_fixed: Sequence[float],
    shared: int,
    file: Path,
) -> None:
    """Three panels: tokens per problem and accuracy by N at a roomy budget; accuracy by N under one fixed shared budget. Bars: 95 %."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    tokens, accuracy, fixed = figure.subplots(1, 3)
    bars(tokens, sizes, base, bcr, "tokens_per_problem", 1.0)
    tokens.set_title("Tokens per problem")
    bars(accuracy, sizes, base, bcr, "accuracy", 100.0, error="accuracy_se")
    accuracy.set(title="Accuracy, budget roomy", ylabel="%", ylim=(0, 105))
    for name, colour, values in (("base", BASE, base_fixed), ("BCR", BCR, bcr_fixed)):
        fixed.plot(list(map(str, sizes)), [100 * value for value in values], "o-", color=colour, label=name, linewidth=2)
    fixed.set(title=f"Accuracy, {shared} tokens shared by all N", ylabel="%", ylim=(0, 105))
    for axes in (tokens, accuracy, fixed):
        axes.set_xlabel("N: problems in one prompt")
        axes.spines[["top", "right"]].set_visible(False)
    fixed.legend(frameon=False)
    figure.savefig(file, dpi=130)


def bars(
    axes: Axes, sizes: Sequence[int], base: Mapping[str, Any], bcr: Mapping[str, Any], name: str, scale: float, error: str | None = None
) -> None:
    """Two bars for each N, with their values written on them."""
    for offset, colour, label, cells in ((-0.2, BASE, "base", base), (0.2, BCR, "BCR", bcr)):
        values = [scale * cells[str(size)][name] for size in sizes]
        places = [index + offset for index in range(len(sizes))]
        errors = [1.96 * scale * cells[str(size)][error] for size in sizes] if error else None
        drawn = axes.bar(places, values, 0.38, color=colour, label=label, yerr=errors, ecolor="#555555")
        axes.bar_label(drawn, fmt="%.0f", fontsize=8, label_type="center" if error else "edge", color="white" if error else "black")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
