"""What the demo's figures say, in a table and in sentences: what shows, what does not, and how sure that is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Measures = Mapping[str, Any]

CAVEATS = [
    "Part of the gain in accuracy is sharpening: the base's slips are sampling noise, and fewer steps leave fewer chances to slip.",
    "One seed, one small world, a base verbose by construction: this shows the mechanism, not how much a large model saves.",
]


def results_table(summary: Mapping[str, Any], sizes: Sequence[int]) -> Table:
    """One row a run, one column an N: accuracy and tokens per problem; the standard errors in the caption."""
    table = Table("", *(f"N = {size}" for size in sizes), box=box.SIMPLE_HEAD, title="accuracy / tokens per problem", caption_style="dim")
    error = 0.0
    for name in summary["runs"]:
        if name in summary:
            cells = [summary[name][str(size)] for size in sizes]
            table.add_row(summary["runs"][name]["title"], *(f"{c['accuracy']:.1%} / {c['tokens_per_problem']:.1f}" for c in cells))
            error = max([error, *(cell["accuracy_se"] for cell in cells)])
    table.caption = f"one standard error of accuracy: up to {100 * error:.1f} points"
    return table


def conclusions(summary: Mapping[str, Any], sizes: Sequence[int]) -> list[str]:
    """One or two sentences for each part that is done; "Not shown" where the figures do not bear out what was expected."""
    said: list[str] = []
    one = str(min(sizes))
    base, bcr, grpo = (summary.get(name) for name in ("base", "bcr", "grpo"))
    tight, capped, penalty = (summary.get(name) for name in ("bcr_tight", "same_cap", "penalty"))
    if base and bcr:
        said += [at_one(base, bcr, one), *over_sizes(base, bcr, sizes)]
    if base and grpo:
        said.append(growth(base[one], grpo[one], bcr[one] if bcr else None, one))
    if tight and capped:
        said += pooling(tight[one], capped[one], summary.get("hardest"), one)
    if base and penalty:
        said.append(collapse(base[one], penalty[one], one))
    if base and bcr:
        said += CAVEATS
    return said


def difference(first: Measures, second: Measures) -> tuple[float, float]:
    """Accuracy of the second less that of the first, and its standard error (the two taken as independent)."""
    return second["accuracy"] - first["accuracy"], math.hypot(first["accuracy_se"], second["accuracy_se"])


def points(change: float, error: float) -> str:
    return f"{100 * change:+.1f} points (standard error {100 * error:.1f})"


def length_change(first: Measures, second: Measures) -> str:
    ratio = second["tokens_per_problem"] / first["tokens_per_problem"]
    return f"{abs(1 - ratio):.0%} {'fewer' if ratio < 1 else 'more'} tokens"


def at_one(base: Measures, bcr: Measures, one: str) -> str:
    return f"BCR at N = {one}: {length_change(base[one], bcr[one])}, accuracy {points(*difference(base[one], bcr[one]))}."


def over_sizes(base: Measures, bcr: Measures, sizes: Sequence[int]) -> list[str]:
    """Whether accuracy holds at every N, and whether tokens per problem fall with N."""
    if len(sizes) < 2:
        return []
    changes = {size: difference(base[str(size)], bcr[str(size)]) for size in sizes}
    least = min(changes, key=lambda size: changes[size][0])
    worse = [size for size, (change, _) in changes.items() if change < 0]
    if worse:
        said = [
            f"Not shown: at N = {', '.join(map(str, worse))} BCR is less accurate than the base (N = {least}: {points(*changes[least])})."
        ]
    else:
        said = [f"BCR is at least as accurate as the base at every N; least so at N = {least}: {points(*changes[least])}."]
    tokens = [bcr[str(size)]["tokens_per_problem"] for size in sizes]
    listed = ", ".join(f"{value:.1f}" for value in tokens)
    if all(later < earlier for earlier, later in itertools.pairwise(tokens)):
        said.append(f"Its tokens per problem fall as N grows ({listed}).")
    else:
        said.append(f"Not shown: tokens per problem do not fall steadily with N after this run ({listed}).")
    return said


def growth(base: Measures, grpo: Measures, bcr: Measures | None, one: str) -> str:
    change, error = difference(base, grpo)
    if grpo["tokens_per_problem"] <= base["tokens_per_problem"]:
        return f"Not shown: plain GRPO did not grow longer ({length_change(base, grpo)} at N = {one})."
    beside = f", {grpo['tokens_per_problem'] / bcr['tokens_per_problem']:.1f} times BCR's" if bcr else ""
    return f"Plain GRPO, the same reward without sharing: {length_change(base, grpo)}{beside}, accuracy {points(change, error)}."


def pooling(tight: Measures, capped: Measures, hardest: Measures | None, one: str) -> list[str]:
    change, error = difference(capped, tight)
    verdict = "Sharing a tight budget" if change > 2 * error else "Not shown: sharing a tight budget"
    said = [f"{verdict} against the same cap for each at N = {one}: {points(change, error)}."]
    if hardest and hardest["tokens_needed"] is not None:
        why = "Why: correct" if change > 2 * error and hardest["tokens_needed"] > hardest["cap"] else "Correct"
        accuracy = hardest["accuracy"]
        said.append(
            f"{why} answers to problems of {hardest['operations']} operations take {hardest['tokens_needed']:.0f} tokens, the cap is "
            f"{hardest['cap']}; of these the shared budget gets {accuracy['bcr_tight']:.0%} right, the cap {accuracy['same_cap']:.0%}."
        )
    return said


def collapse(base: Measures, penalty: Measures, one: str) -> str:
    found = f"{penalty['accuracy']:.1%} right in {penalty['tokens_per_problem']:.1f} tokens at N = {one}"
    if penalty["accuracy"] > base["accuracy"] / 2:
        return f"Not shown: the length penalty did not collapse ({found})."
    why = "it stopped answering" if penalty["unanswered"] > 0.5 else "it guesses, 1 time in 13 rightly"
    return f"The length penalty collapsed: {found}; {why}, for tokens saved pay more than answers."
