"""The tables of a study: on the console, on its page, and in documents. Bold, as Markdown has it, is what is shown (`study_findings`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from bcr.analysis.report.figures import Table as Numbers
from bcr.analysis.study_findings import direction, signed

Summary = Mapping[str, Any]


def overview(summary: Summary) -> Table:
    """One row a cell, one column an N: accuracy and tokens per problem, over the seeds."""
    sizes = summary["measurement"]["sizes"]
    table = Table("", "seeds", *(f"N = {size}" for size in sizes), box=box.SIMPLE_HEAD, title="accuracy % / tokens per problem")
    for cell in summary["cells"].values():
        found = [cell["sizes"][str(size)] for size in sizes]
        table.add_row(cell["label"], str(len(cell["seeds"])), *(f"{100 * at['accuracy'][0]:.1f} / {at['tokens'][0]:.1f}" for at in found))
    return table


def made(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Numbers:
    return Numbers(list(head), [list(row) for row in rows])


def markdown(numbers: Numbers) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [numbers.head, ["---", *["---:"] * (len(numbers.head) - 1)], *numbers.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def at_one(summary: Summary) -> Numbers:
    """Every cell at the smallest N: accuracy and tokens with intervals over problems and the range over seeds, and what training took."""
    size = str(summary["measurement"]["sizes"][0])
    head = ["", "seeds", "accuracy %", "over seeds", "tokens", "over seeds", "area", "checks", "M tokens to train"]
    rows = []
    for cell in summary["cells"].values():
        at = cell["sizes"][size]
        accuracy, tokens = at["by_seed"]["accuracy"], at["by_seed"]["tokens"]
        rows.append(
            [
                cell["title"],
                str(len(cell["seeds"])),
                interval([100 * number for number in at["accuracy"]]),
                spread([100 * number for number in accuracy]),
                interval(at["tokens"]),
                spread(tokens),
                "" if None in cell["area"] else f"{sum(cell['area']) / len(cell['area']):.3f}",
                f"{at['checks_per_problem']:.2f}",
                f"{cell['training']['tokens'] / 1e6:.2f}" if cell["training"] else "",
            ]
        )
    return made(head, rows)


def by_size(summary: Summary) -> Numbers:
    """Accuracy and tokens per problem of every cell at each N, with room for all."""
    sizes = summary["measurement"]["sizes"]
    head = ["accuracy % / tokens per problem", "seeds", *(f"N = {size}" for size in sizes)]
    return made(head, (size_row(cell, sizes) for cell in summary["cells"].values()))


def size_row(cell: Summary, sizes: Sequence[int]) -> list[str]:
    found = [cell["sizes"][str(size)] for size in sizes]
    return [cell["title"], str(len(cell["seeds"])), *(f"{100 * at['accuracy'][0]:.1f} / {at['tokens'][0]:.1f}" for at in found)]


def under_shared(summary: Summary, budget: int) -> Numbers:
    """Accuracy of every cell at each N where all N problems together get `budget` tokens."""
    sizes = summary["measurement"]["sizes"]
    head = [f"accuracy %, {budget} tokens for all", "seeds", *(f"N = {size}" for size in sizes)]
    rows = (
        [cell["title"], str(len(cell["seeds"])), *(f"{100 * cell['sizes'][str(size)]['cut'][str(budget)]:.1f}" for size in sizes)]
        for cell in summary["cells"].values()
    )
    return made(head, rows)


def under_budgets(summary: Summary) -> Numbers:
    """Accuracy of every cell at the smallest N under each token budget, cut out of the one long run."""
    size = str(summary["measurement"]["sizes"][0])
    roomy = summary["measurement"]["roomy"]
    budgets = [budget for budget in summary["measurement"]["cut_at"] if budget <= roomy]
    head = [f"accuracy % at N = {size}", *(f"{budget} tokens" for budget in budgets)]
    cut = [(cell["title"], cell["sizes"][size]["cut"]) for cell in summary["cells"].values()]
    rows = ([title, *(f"{100 * found[str(budget)]:.1f}" for budget in budgets)] for title, found in cut)
    return made(head, rows)


def differences(summary: Summary, quantity: str) -> Numbers:
    """Every comparison at each N: the paired difference in `quantity` (accuracy, tokens, shared) and its interval; bold where shown."""
    sizes = [str(size) for size in summary["measurement"]["sizes"]]
    scale = 1.0 if quantity == "tokens" else 100.0
    names = {"accuracy": "accuracy, points", "tokens": "tokens per problem", "shared": "accuracy under 110 shared tokens, points"}
    rows = []
    for comparison in summary["compare"]:
        one, control = (summary["cells"][comparison[side]]["label"] for side in ("one", "control"))
        cells = [shown(comparison["sizes"][size][quantity], scale) for size in sizes]
        rows.append([f"{one} − {control}", str(len(comparison["seeds"])), *cells])
    return made([names[quantity], "seeds", *(f"N = {size}" for size in sizes)], rows)


def shown(found: Summary, scale: float) -> str:
    value, low, high = (signed(scale * number) for number in found["difference"])
    figure = f"**{value}**" if direction(found) else value
    return f"{figure} [{low}, {high}]"


def lengths(summary: Summary) -> Numbers:
    """The task-scaling law of every cell: the exponent of tokens ~ N^-exponent, of the mean and seed by seed; how far a mean lies from the
    fitted law at the most; tokens at the last N less the first."""
    sizes = summary["measurement"]["sizes"]
    ends = f"tokens at N = {sizes[-1]} less N = {sizes[0]}"
    rows = []
    for cell in summary["cells"].values():
        law, seeds = cell["law"], str(len(cell["seeds"]))
        each = ", ".join(f"{exponent:.3f}" for exponent in law["by_seed"])
        off = f"{max(abs(math.expm1(residual)) for residual in law['residuals']):.0%}"
        steady = f"{sum(law['monotone_by_seed'])} of {len(law['monotone_by_seed'])}"
        rows.append([cell["title"], seeds, f"{law['exponent']:.3f}", each, off, shown(law["last_less_first"], 1.0), steady])
    return made(["", "seeds", "exponent", "of each seed", "off by up to", ends, "falls at every step"], rows)


def breakdown(summary: Summary, names: Sequence[str] | None = None) -> Numbers:
    """At the smallest N: by difficulty, by correctness, and what loops there are."""
    size = str(summary["measurement"]["sizes"][0])
    levels = list(summary["cells"]["base"]["sizes"][size]["by_difficulty"])
    head = ["accuracy % / tokens", *(f"{level} operations" for level in levels), "correct", "other", "loops in 1,000 tokens"]
    rows = []
    for name, cell in summary["cells"].items():
        if names is None or name in names:
            at = cell["sizes"][size]
            groups = [f"{100 * group['accuracy']:.1f} / {group['tokens']:.1f}" for group in at["by_difficulty"].values()]
            tokens = [number(at[key]) for key in ("tokens_correct", "tokens_wrong", "loops_per_thousand")]
            rows.append([cell["title"], *groups, *tokens])
    return made(head, rows)


def by_position(summary: Summary, size: int, names: Sequence[str] | None = None) -> Numbers:
    """Accuracy and tokens at each position of a prompt of `size` problems."""
    rows = []
    for name, cell in summary["cells"].items():
        if names is None or name in names:
            groups = cell["sizes"][str(size)]["by_position"].values()
            rows.append([cell["title"], *(f"{100 * group['accuracy']:.1f} / {group['tokens']:.1f}" for group in groups)])
    return made([f"accuracy % / tokens at N = {size}", *(f"problem {place}" for place in range(1, size + 1))], rows)


def collapse(summary: Summary) -> Numbers:
    """Every cell at the smallest N, seed by seed: accuracy and tokens, and the share of problems without any answer."""
    size = str(summary["measurement"]["sizes"][0])
    rows = []
    for cell in summary["cells"].values():
        at = cell["sizes"][size]
        each = ", ".join(f"{100 * a:.1f} / {t:.1f}" for a, t in zip(at["by_seed"]["accuracy"], at["by_seed"]["tokens"], strict=True))
        rows.append([cell["title"], str(len(cell["seeds"])), each, f"{100 * at['unanswered']:.1f}"])
    return made(["", "seeds", f"accuracy % / tokens at N = {size}, of each seed", "unanswered %"], rows)


def interval(estimate: Sequence[float]) -> str:
    value, low, high = estimate
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}" if len(values) > 1 else ""


def number(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"


def done(summary: Summary) -> str:
    """Which cells have how many seeds, in one sentence."""
    counts: dict[int, list[str]] = {}
    for name, cell in summary["cells"].items():
        if name != "base":
            counts.setdefault(len(cell["seeds"]), []).append(cell["label"])
    told = [f"{count} seed{'s' if count > 1 else ''} of {', '.join(labels)}" for count, labels in sorted(counts.items(), reverse=True)]
    missing = f"; none yet of {', '.join(summary['missing'])}" if summary["missing"] else ""
    return f"Measured: {'; '.join(told)}{missing}."
