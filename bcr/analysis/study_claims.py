"""The claims under test, each with its verdict and its figure, in one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bcr.analysis.report.figures import Table as Numbers
from bcr.analysis.study_findings import Difference, collapsed_seeds, direction, seeds, signed

Summary = Mapping[str, Any]

# study -> (claim, one, control, N, quantity, the sign it asks for: 1 more, -1 less, 0 not less)
COMPARED: dict[str, tuple[tuple[str, str, str, str, str, int], ...]] = {
    "rivals": (
        ("BCR is shorter than the base at N = 1", "bcr", "base", "1", "tokens", -1),
        ("BCR is as accurate as the base at N = 1, or more", "bcr", "base", "1", "accuracy", 0),
        ("BCR is more accurate than the base at N = 3", "bcr", "base", "3", "accuracy", 1),
        ("BCR is more accurate than the base at N = 6", "bcr", "base", "6", "accuracy", 1),
        ("Packing beats the same cap at N = 1: 120 for three against 40 each", "bcr", "same_cap", "1", "accuracy", 1),
        ("The same, when tight: 66 for three against 22 each", "bcr_tight", "same_cap_tight", "1", "accuracy", 1),
        ("Packing beats the same cap at N = 3, 120 against 40", "bcr", "same_cap", "3", "accuracy", 1),
        ("A shared context beats separate ones on one budget of 120, at N = 1", "bcr", "separate", "1", "accuracy", 1),
        ("The same with a budget of 66, at N = 1", "bcr_tight", "separate_tight", "1", "accuracy", 1),
        ("A shared context beats separate ones on one budget of 120, at N = 3", "bcr", "separate", "3", "accuracy", 1),
        ("The same with a budget of 66, at N = 3", "bcr_tight", "separate_tight", "3", "accuracy", 1),
        ("A pooled budget of 66 beats 22 each without any shared context", "separate_tight", "same_cap_tight", "1", "accuracy", 1),
        ("Plain GRPO grows longer", "grpo", "base", "1", "tokens", 1),
    ),
    "recipes": (
        ("Mixed N is as accurate as N = 3 at N = 3, or more", "mixed", "bcr", "3", "accuracy", 0),
        ("Mixed N is more accurate at N = 6", "mixed", "bcr", "6", "accuracy", 1),
        ("Long mixed training at a roomy budget is more accurate at N = 1", "mixed_long", "bcr", "1", "accuracy", 1),
        ("Long mixed training at a roomy budget is more accurate at N = 6", "mixed_long", "bcr", "6", "accuracy", 1),
        ("Credit for each problem is more accurate than for the rollout, at N = 3", "problem_credit", "bcr", "3", "accuracy", 1),
        ("Training on easy problems is as accurate on all, or more", "easy", "bcr", "1", "accuracy", 0),
    ),
}
LAWFUL = ("bcr", "mixed", "mixed_long")
COLLAPSING = ("penalty_03", "penalty_1", "penalty_15", "penalty_2", "bcr", "bcr_tight")


def claims(summary: Summary) -> Numbers:
    """Every claim whose cells are there. "Yes" and "no" are shown differences; else "not shown", or "no loss shown"."""
    rows = []
    pairs = {(found["one"], found["control"]): found for found in summary["compare"]}
    for claim, one, control, size, quantity, sign in COMPARED.get(summary["study"], ()):
        found = pairs.get((one, control))
        if found and size in found["sizes"]:
            difference = found["sizes"][size][quantity]
            rows.append([claim, verdict(difference, sign), figure(difference, quantity), seeds(found["seeds"])])
    for name in LAWFUL if summary["study"] == "recipes" else ():
        if cell := summary["cells"].get(name):
            fallen = cell["law"]["last_less_first"]
            sizes = summary["measurement"]["sizes"]
            claim = f"Tokens per problem fall from N = {sizes[0]} to N = {sizes[-1]}: {cell['title']}"
            rows.append([claim, verdict(fallen, -1), figure(fallen, "tokens"), seeds(cell["seeds"])])
    for name in COLLAPSING if summary["study"] != "recipes" else ():
        if cell := summary["cells"].get(name):
            lost = len(collapsed_seeds(cell))
            told = f"{lost} of {seeds(cell['seeds'])}; at the worst {min(cell['kept']):.0%} of the base's accuracy is left"
            rows.append([f"Training collapses: {cell['title']}", "yes" if lost else "no", told, seeds(cell["seeds"])])
    return Numbers(["claim", "shown?", "figure", "seeds"], rows)


def verdict(found: Difference, sign: int) -> str:
    """Whether the data bears out a claim of `sign`: 1 more, -1 less, 0 not less.

    >>> more = {"difference": [0.05, 0.01, 0.09], "by_seed": [0.04, 0.06]}
    >>> verdict(more, 1), verdict(more, -1), verdict(more, 0)
    ('yes', 'no, the other way round', 'yes')
    >>> unclear = {"difference": [0.01, -0.01, 0.03], "by_seed": [0.01]}
    >>> verdict(unclear, 1), verdict(unclear, 0)
    ('not shown', 'no loss shown')
    """
    found_sign = direction(found)
    if sign == 0:
        return {1: "yes", 0: "no loss shown", -1: "no"}[found_sign]
    if found_sign == 0:
        return "not shown"
    return "yes" if found_sign == sign else "no, the other way round"


def figure(found: Difference, quantity: str) -> str:
    scale, unit = (1.0, " tokens") if quantity == "tokens" else (100.0, " points")
    value, low, high = (signed(scale * number) for number in found["difference"])
    each = ", ".join(signed(scale * number) for number in found["by_seed"])
    return f"{value}{unit} [{low}, {high}]" + (f"; of each seed {each}" if len(found["by_seed"]) > 1 else "")
