"""What a shared budget adds to a cap: easy problems lend tokens to hard ones. Both runs by difficulty, beside the cap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from bcr.analysis.report.curves import BESIDE, percent, plain
from bcr.analysis.report.figures import Figure, Table, accuracy_interval, colour_of, number
from bcr.analysis.report.folder import Record, Results, Run
from bcr.analysis.report.svg import Panel, nice_limits, ticks_between


def pooling(results: Results) -> Figure | None:
    """Accuracy and length by the number of operations, for the run on a tight shared budget and for the one under the same cap each.

    Of the evaluation at N = 1, where neither has anything to lend any more: what is left is what training taught them.
    """
    hardest = results.summary.get("hardest") or {}
    by_key = hardest.get("by_operations") or {}
    runs = [run for run in results.runs if by_key.get(run.key)]
    if not runs:
        return None
    cells = {run.key: {int(operations): cell for operations, cell in by_key[run.key].items()} for run in runs}
    lengths = [cell["tokens_correct"] for of_run in cells.values() for cell in of_run.values() if cell.get("tokens_correct") is not None]
    panels = [
        ("Accuracy at N = 1", panel(runs, cells, "accuracy", (0.0, 1.0), percent, None)),
        (
            "Tokens of a correct answer at N = 1",
            panel(runs, cells, "tokens_correct", nice_limits([*lengths, hardest["cap"]]), plain, hardest["cap"]),
        ),
    ]
    rows = [
        [run.label, str(operations), f"{cell['accuracy']:.1%}", number(cell.get("tokens_correct")), str(cell["problems"])]
        for run in runs
        for operations, cell in sorted(cells[run.key].items())
    ]
    caption = (
        f"Two ways to spend the same tokens in training: pooled by three problems, or {hardest['cap']} for each (dashed). A problem that "
        f"needs more is lost under a cap; in a pool, easier ones can lend it theirs. Measured with room to spare; bars are 95 % intervals."
    )
    table = Table(["run", "operations", "accuracy", "tokens, correct", "problems"], rows)
    return Figure("pooling", "What sharing adds to a cap", caption, panels, table)


def panel(
    runs: Sequence[Run],
    cells: dict[str, dict[int, Record]],
    name: str,
    limits: tuple[float, float],
    shown: Callable[[float], str],
    cap: float | None,
) -> Markup:
    every = sorted({operations for of_run in cells.values() for operations in of_run})
    drawn = Panel((every[0] - 0.25, every[-1] + 0.25), limits, right=BESIDE)
    drawn.axes([float(operations) for operations in every], ticks_between(*limits), "operations of the problem", shown)
    if cap is not None:
        drawn.line([(every[0] - 0.25, cap), (every[-1] + 0.25, cap)], "soft", kind="fit")
    labels, said = [], []
    for index, run in enumerate(runs):
        colour, shift = colour_of(run), 8 * (index - (len(runs) - 1) / 2)
        found = [(float(at), cell) for at, cell in sorted(cells[run.key].items()) if cell.get(name) is not None]
        if not found:
            continue
        drawn.line([(at, cell[name]) for at, cell in found], colour, shift=shift)
        for at, cell in found:
            if name == "accuracy":
                drawn.interval(at, *accuracy_interval(cell), colour, shift)
            drawn.dot(at, cell[name], colour, f"{run.title}, {at:g} operations: {shown(round(cell[name], 3))}", shift)
        labels.append((found[-1][1][name], run.label, colour))
        said.append(f"{run.label}: " + ", ".join(shown(round(cell[name], 3)) for _, cell in found))
    if cap is not None:
        labels.append((cap, f"cap {cap:g}", "soft"))
    drawn.end_labels(labels)
    return drawn.svg(f"{name.replace('_', ' ').capitalize()} for {', '.join(map(str, every))} operations. {'; '.join(said)}.")
