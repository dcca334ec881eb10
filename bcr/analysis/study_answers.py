"""The questions that a study is asked, each answered in sentences from its figures, whichever way they turned out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bcr.analysis.study_findings import collapsed_seeds, direction, of_collapse, of_comparison, of_lengths, seeds, signed

Summary = Mapping[str, Any]


def answers(summary: Summary, question: str) -> list[str]:
    """ValueError for a question that nobody has asked before. A question whose cells are not there yet says so."""
    if question not in QUESTIONS:
        raise ValueError(f"{question!r} is no question; there are {', '.join(QUESTIONS)}.")
    return QUESTIONS[question](summary)


def pair(summary: Summary, one: str, control: str) -> Summary | None:
    return next((found for found in summary["compare"] if (found["one"], found["control"]) == (one, control)), None)


def between(summary: Summary, *pairs: tuple[str, str], shared: bool = False) -> list[str]:
    """A sentence for each comparison that is there; with `shared` also on what a tight budget for all N leaves."""
    quantities = ("accuracy", "tokens", "shared") if shared else ("accuracy", "tokens")
    found = [comparison for one, control in pairs if (comparison := pair(summary, one, control))]
    return [of_comparison(summary, comparison, quantities) for comparison in found] or ["Not measured yet."]


def free_lunch(summary: Summary) -> list[str]:
    """Shorter at N = 1, and as accurate or better?"""
    found = pair(summary, "bcr", "base")
    if found is None:
        return ["Not measured yet."]
    one = found["sizes"]["1"]
    before = summary["cells"]["base"]["sizes"]["1"]["tokens"][0]
    shorter, accuracy = -found["sizes"]["1"]["tokens"]["difference"][0] / before, direction(one["accuracy"])
    holds = direction(one["tokens"]) < 0 and accuracy >= 0
    said = "The free lunch at N = 1 reproduces" if holds else "The free lunch at N = 1 does not reproduce"
    value, low, high = (signed(100 * number) for number in one["accuracy"]["difference"])
    return [
        f"{said}: {shorter:.0%} fewer tokens, accuracy {value} points [{low}, {high}] ({seeds(found['seeds'])}).",
        *graceful(summary, "bcr"),
    ]


def graceful(summary: Summary, name: str) -> list[str]:
    """How accuracy goes down with N, beside the base."""
    parts = []
    for cell in (summary["cells"]["base"], summary["cells"][name]):
        sizes = cell["sizes"]
        first, last = (sizes[size]["accuracy"][0] for size in (min(sizes, key=int), max(sizes, key=int)))
        parts.append(f"{cell['label']} from {100 * first:.1f} % to {100 * last:.1f} %")
    sizes = summary["measurement"]["sizes"]
    return [f"From N = {sizes[0]} to N = {sizes[-1]}, with room for all, accuracy goes: {', '.join(parts)}."]


def beyond_a_cap(summary: Summary) -> list[str]:
    pairs = (("bcr", "same_cap"), ("bcr_tight", "same_cap_tight"))
    return [*between(summary, *pairs, shared=True), *hardest(summary, *pairs)]


def beyond_a_pool(summary: Summary) -> list[str]:
    pairs = (("bcr", "separate"), ("bcr_tight", "separate_tight"), ("separate", "same_cap"), ("separate_tight", "same_cap_tight"))
    return [*between(summary, *pairs, shared=True), *hardest(summary, *pairs)]


def hardest(summary: Summary, *pairs: tuple[str, str]) -> list[str]:
    """On the problems with the most operations, at N = 1."""
    said = []
    for one, control in pairs:
        found = pair(summary, one, control)
        if found and found["hardest"]:
            value, low, high = (signed(100 * number) for number in found["hardest"]["difference"])
            ours, theirs = (summary["cells"][name]["label"] for name in (one, control))
            doubt = "" if direction(found["hardest"]) else ", not shown"
            said.append(f"On problems of four operations alone, at N = 1: {ours} less {theirs} {value} points [{low}, {high}]{doubt}.")
    return said


def plain_grpo(summary: Summary) -> list[str]:
    return between(summary, ("grpo", "base"), ("bcr", "grpo"))


def against_rewards(summary: Summary) -> list[str]:
    """BCR against every reward that looks at the length."""
    skip = ("base", "same_cap", "grpo", "separate")
    return tally(summary, [found for found in summary["compare"] if found["one"] == "bcr" and found["control"] not in skip])


def mixed_against(summary: Summary) -> list[str]:
    """BCR at mixed N, its safer recipe, against the cap and the rivals that are not shown to be behind BCR at its own N."""
    return between(summary, *(("mixed", control) for control in ("same_cap", "truncation", "dler", "dapo", "laser_d_moving")))


def tally(summary: Summary, comparisons: list[Summary]) -> list[str]:
    """Which rivals are ahead of BCR, behind it, or neither, in accuracy and in length, alone and at the N that BCR was trained at."""
    said = []
    for size in [size for size in ("1", "3") if size in summary["cells"]["base"]["sizes"]]:
        for quantity, words in TALLY.items():
            groups: dict[int, list[str]] = {-1: [], 0: [], 1: []}
            for found in comparisons:
                difference = found["sizes"][size][quantity]
                value = signed(-difference["difference"][0] * (1 if quantity == "tokens" else 100))
                groups[direction(difference)].append(f"{summary['cells'][found['control']]['label']} ({value})")
            told = [f"{words[kind]}: {', '.join(names)}" for kind, names in groups.items() if names]
            said.append(f"At N = {size} the rivals, beside BCR. {upper('; '.join(told))}.")
    return said


def upper(text: str) -> str:
    return text[:1].upper() + text[1:]


TALLY = {  # of BCR less the rival
    "accuracy": {-1: "more accurate, by points", 0: "no difference in accuracy shown", 1: "less accurate, by points"},
    "tokens": {-1: "longer, by tokens a problem", 0: "no difference in length shown", 1: "shorter, by tokens a problem"},
}


def long_recipe(summary: Summary) -> list[str]:
    """Is the long mixed recipe the better default?"""
    if "mixed_long" not in summary["cells"]:
        return ["Not measured yet."]
    cells = {name: summary["cells"][name] for name in ("bcr", "mixed", "mixed_long") if name in summary["cells"]}
    worst = [f"{cell['label']} {100 * least_accuracy(cell):.1f} % ({seeds(cell['seeds'])})" for cell in cells.values()]
    trained = [f"{cell['label']} {cell['training']['tokens'] / 1e6:.1f} million" for cell in cells.values()]
    return [
        *between(summary, ("mixed_long", "bcr"), ("mixed_long", "mixed"), ("mixed", "bcr"), ("mixed_long", "bcr_long")),
        f"The least accuracy at any N and in any seed: {', '.join(worst)}.",
        *safer_default(cells),
        f"Tokens sampled in training: {', '.join(trained)}.",
    ]


def least_accuracy(cell: Summary) -> float:
    """At the worst N of the worst seed."""
    return min(accuracy for at in cell["sizes"].values() for accuracy in at["by_seed"]["accuracy"])


def safer_default(cells: Mapping[str, Summary]) -> list[str]:
    """Which of the recipes of the same cost keeps more accuracy where it keeps least."""
    if not {"bcr", "mixed"} <= cells.keys():
        return []
    better, other = sorted((cells["bcr"], cells["mixed"]), key=least_accuracy, reverse=True)
    kept = [f"{100 * least_accuracy(cell):.1f} %" for cell in (better, other)]
    lengths = [f"{sum(at['tokens'][0] for at in cell['sizes'].values()) / len(cell['sizes']):.1f}" for cell in (better, other)]
    return [
        f"Of the two with 60 steps, {better['label']} is the safer default: at its worst it keeps {kept[0]}, {other['label']} {kept[1]}. "
        f"On average over N its answers take {lengths[0]} tokens a problem, those of {other['label']} {lengths[1]}."
    ]


def positions(summary: Summary) -> list[str]:
    """Where in the prompt the tokens go, at the N of the default recipe and at one problem fewer."""
    said = []
    for name in ("bcr", "mixed", "mixed_long"):
        if cell := summary["cells"].get(name):
            told = []
            for size in [size for size in ("2", "3") if size in cell["sizes"]]:
                groups = cell["sizes"][size]["by_position"].values()
                tokens, right = ([group[key] for group in groups] for key in ("tokens", "accuracy"))
                spent, correct = (", ".join(f"{scale * value:.0f}" for value in values) for values, scale in ((tokens, 1), (right, 100)))
                told.append(f"at N = {size} {spent} tokens ({correct} % right)")
            said.append(f"{cell['label']}, problem by problem: {'; '.join(told)}.")
    return said or ["Not measured yet."]


def fragile(summary: Summary) -> list[str]:
    """Where a seed is clearly less accurate than the base at some N: what training at few N costs at others."""
    base = summary["cells"]["base"]["sizes"]
    said = []
    for name, cell in summary["cells"].items():
        lost = [
            f"N = {size} ({100 * min(at['by_seed']['accuracy']):.0f} %)"
            for size, at in cell["sizes"].items()
            if min(at["by_seed"]["accuracy"]) < base[size]["accuracy"][0] - FRAGILE
        ]
        if name != "base" and lost:
            said.append(f"{cell['label']} at {', '.join(lost)}")
    what = f"more than {100 * FRAGILE:.0f} points below the base in their worst seed"
    return [f"Cells that fall {what}: {'; '.join(said)}." if said else f"No cells fall {what} at any N."]


FRAGILE = 0.05


def own_choices(summary: Summary) -> list[str]:
    return between(summary, ("n2", "bcr"), ("n4", "bcr"), ("n5", "bcr"), ("roomy", "bcr"))


def credit(summary: Summary) -> list[str]:
    return between(summary, ("problem_credit", "bcr"))


def problems(summary: Summary) -> list[str]:
    return between(summary, ("easy", "bcr"), ("hard", "bcr"))


def cliff(summary: Summary) -> list[str]:
    """Between which weights the penalty collapses, and which changes at weight 2 keep it from that."""
    weights = {"penalty_03": 0.3, "penalty_1": 1.0, "penalty_15": 1.5, "penalty_2": 2.0}
    lost = {weights[name]: len(collapsed_seeds(cell)) / len(cell["seeds"]) for name, cell in summary["cells"].items() if name in weights}
    safe, fallen = [weight for weight, share in lost.items() if share == 0], [weight for weight, share in lost.items() if share > 0]
    said = []
    if safe and fallen:
        edge, share = max((weight for weight in safe if weight < min(fallen)), default=0.0), lost[min(fallen)]
        said.append(
            f"The cliff lies between the weights {edge:g}, where no seed collapses, and {min(fallen):g}, where {share:.0%} of them do."
        )
    said += of_collapse(summary)
    others = [name for name in summary["cells"] if name.startswith("penalty_2_")]
    held = [summary["cells"][name]["title"] for name in others if not collapsed_seeds(summary["cells"][name])]
    said.append(f"At weight 2 these keep it from the cliff in every seed: {'; '.join(held) or 'none of those tried'}.")
    return [*said, *packed_damage(summary)]


def packed_damage(summary: Summary) -> list[str]:
    """What a penalty on single problems does to packed prompts, before the cliff."""
    base = summary["cells"]["base"]["sizes"]
    said = []
    for name in ("penalty_03", "penalty_1", "penalty_15"):
        if name in summary["cells"]:
            cell = summary["cells"][name]
            change = {size: 100 * (at["accuracy"][0] - base[size]["accuracy"][0]) for size, at in cell["sizes"].items()}
            said.append(
                f"weight {cell['label'].removeprefix('penalty ')}: "
                + ", ".join(f"{signed(value)} at N = {size}" for size, value in change.items())
            )
    return [f"Accuracy against the base, in points, of models trained on single problems: {'; '.join(said)}."] if said else []


QUESTIONS: dict[str, Callable[[Summary], list[str]]] = {
    "free_lunch": free_lunch,
    "beyond_a_cap": beyond_a_cap,
    "beyond_a_pool": beyond_a_pool,
    "plain_grpo": plain_grpo,
    "against_rewards": against_rewards,
    "mixed_against": mixed_against,
    "lengths": of_lengths,
    "long_recipe": long_recipe,
    "positions": positions,
    "fragile": fragile,
    "own_choices": own_choices,
    "credit": credit,
    "problems": problems,
    "cliff": cliff,
}
