"""What the figures of a study say, in sentences, by one rule for all.

A difference is shown where its 95 % interval over problems leaves out 0 and every seed has its sign. Else it is not shown, which is not
the same as that there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Summary = Mapping[str, Any]
Difference = Mapping[str, Any]

COLLAPSED = 0.5  # a seed that keeps less than this share of the base's accuracy, where it was trained
WORDS = {  # quantity -> what a positive, a negative and no difference are called, the scale and the unit
    "accuracy": ("more accurate", "less accurate", "no difference in accuracy shown", 100.0, " points"),
    "tokens": ("longer", "shorter", "no difference in length shown", 1.0, " tokens a problem"),
    "shared": (
        "with 110 tokens for all N together more accurate",
        "with 110 tokens for all N together less accurate",
        "with 110 tokens for all N together no difference in accuracy shown",
        100.0,
        " points",
    ),
}


def direction(found: Difference) -> int:
    """1 or -1 where the difference is shown, 0 where it is not.

    >>> direction({"difference": [0.05, 0.01, 0.09], "by_seed": [0.04, 0.06]})
    1
    >>> direction({"difference": [0.05, 0.01, 0.09], "by_seed": [-0.01, 0.11]})
    0
    """
    _, low, high = found["difference"]
    if low > 0 and min(found["by_seed"]) > 0:
        return 1
    return -1 if high < 0 and max(found["by_seed"]) < 0 else 0


def findings(summary: Summary) -> list[str]:
    """Sentences on every comparison of the study, on tokens over N, and on what collapsed."""
    said = [of_comparison(summary, comparison) for comparison in summary["compare"]]
    return [*said, *of_lengths(summary), *of_collapse(summary)]


def of_comparison(summary: Summary, comparison: Summary, quantities: Sequence[str] = ("accuracy", "tokens")) -> str:
    """At which N one is more accurate, or shorter, than its control, and by how much."""
    one, control = (summary["cells"][comparison[side]]["label"] for side in ("one", "control"))
    parts = [profile(comparison, quantity) for quantity in quantities if quantity in next(iter(comparison["sizes"].values()))]
    return f"{one} against {control} ({seeds(comparison['seeds'])}): {'; '.join(parts)}."


def profile(comparison: Summary, quantity: str) -> str:
    """One quantity over N.

    >>> up, none = {"difference": [2.0, 1.0, 3.0], "by_seed": [2.0]}, {"difference": [1.0, -1.0, 3.0], "by_seed": [1.0]}
    >>> profile({"sizes": {"1": {"tokens": up}, "2": {"tokens": up}, "3": {"tokens": none}}}, "tokens")
    'longer at N = 1, 2 (+2.0 tokens a problem), no difference shown at N = 3 (+1.0)'
    >>> profile({"sizes": {"1": {"tokens": up}, "2": {"tokens": up}}}, "tokens")
    'longer at every N (+2.0 tokens a problem)'
    """
    more, less, same, scale, unit = WORDS[quantity]
    parts: list[str] = []
    for kind, word in ((1, more), (-1, less), (0, "no difference shown")):
        found = {size: at[quantity] for size, at in comparison["sizes"].items() if direction(at[quantity]) == kind}
        if found:
            where = "every N" if len(found) == len(comparison["sizes"]) > 1 else f"N = {', '.join(found)}"
            values = span([scale * difference["difference"][0] for difference in found.values()])
            parts.append(f"{word if kind or parts else same} at {where} ({values}{'' if parts else unit})")
    return ", ".join(parts)


def span(values: Sequence[float]) -> str:
    """
    >>> span([1.0, 2.5]), span([-0.3])
    ('+1.0 to +2.5', '−0.3')
    """
    low, high = signed(min(values)), signed(max(values))
    return low if low == high else f"{low} to {high}"


def signed(value: float) -> str:
    """One decimal, with a real minus sign.

    >>> signed(-1.26), signed(0.04)
    ('−1.3', '+0.0')
    """
    return f"{'−' if value < 0 else '+'}{abs(value):.1f}"


def seeds(numbers: Sequence[object]) -> str:
    return f"{len(numbers)} seed{'' if len(numbers) == 1 else 's'}"


def of_lengths(summary: Summary) -> list[str]:
    """Whether tokens per problem fall with N: from the first N to the last, and at every step between."""
    sizes = summary["measurement"]["sizes"]
    if len(sizes) < 2:
        return []
    groups: dict[int, list[str]] = {-1: [], 1: [], 0: []}
    steadily = []
    for cell in summary["cells"].values():
        found = cell["law"]["last_less_first"]
        groups[direction(found)].append(f"{cell['label']} ({signed(found['difference'][0])}, {seeds(cell['seeds'])})")
        if all(cell["law"]["monotone_by_seed"]):
            steadily.append(cell["label"])
    words = {-1: "fall", 1: "rise", 0: "are not shown to change"}
    said = [
        f"Tokens per problem {words[kind]} from N = {sizes[0]} to N = {sizes[-1]}: {', '.join(names)}."
        for kind, names in groups.items()
        if names
    ]
    steady = f"in {', '.join(steadily)}" if steadily else "in no cell"
    return [*said, f"They fall at every step of N and in every seed, as the task-scaling law has it, {steady}."]


def of_collapse(summary: Summary) -> list[str]:
    """Cells with a seed that lost more than half of the base's accuracy at what it was trained on."""
    fallen = []
    for cell in summary["cells"].values():
        if lost := collapsed_seeds(cell):
            fallen.append(f"{cell['label']} ({len(lost)} of {seeds(cell['seeds'])}, {min(lost):.0%} of it left at the worst)")
    what = "half of the base's accuracy, on problems like those of its training and at its N"
    if not fallen:
        return [f"Nothing collapsed: every seed of every cell keeps more than {what}."]
    return [f"Collapsed, that is below {what}: {', '.join(fallen)}."]


def collapsed_seeds(cell: Summary) -> list[float]:
    """What is left of the base's accuracy in those seeds that collapsed."""
    return [share for share in cell["kept"] if share is not None and share < COLLAPSED]
