"""What the results of a study come to: every cell over its seeds, and every comparison problem by problem.

The prompt is the unit of every interval (`bcr.analysis.estimates`): its problems share a context and are resampled together. A problem
counts with its mean over the seeds; an interval therefore speaks of other problems, and what other seeds would give is shown by the figures
of each seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bcr.analysis.estimates import Estimate, area_under_curve, mean_at_k, mean_interval, paired_difference
from bcr.analysis.scaling_law import fit_scaling_law
from bcr.analysis.study_findings import findings

Result = Mapping[str, Any]  # result.json of one cell and seed
Summary = dict[str, Any]

AVERAGED = ("tokens_correct", "tokens_wrong", "checks_per_problem", "truncated", "unanswered", "loops_per_thousand", "repetition")
SHARED_BUDGET = 110  # tokens for all N problems together, where a study has cut at it


def summarise_study(
    name: str, title: str, about: Mapping[str, Any], compare: Sequence[Sequence[str]], results: Mapping[str, Sequence[Result]]
) -> Summary:
    """study.json. `results`: cell -> its results by seed, "base" among them; `compare`: pairs (one, control).

    An estimate is [value, low, high], at 95 %; `by_seed` has one number a seed. Comparisons are made over the seeds that both have; the
    base has one measurement, with which every seed is compared.
    """
    told = {"base": {"title": "The shipped base, untrained", "label": "base", "overrides": []}, **about}
    first = next(iter(results.values()))[0]
    summary = {
        "study": name,
        "title": title,
        "measurement": first["measurement"],
        "cells": {cell: {**told[cell], **summarise_cell(found, results["base"][0])} for cell, found in results.items()},
        "missing": [told[cell]["label"] for cell in about if cell not in results],
        "compare": [compared(one, control, results) for one, control in compare if one in results and control in results],
    }
    return {**summary, "said": findings(summary)}


def summarise_cell(found: Sequence[Result], base: Result) -> Summary:
    sizes = found[0]["measurement"]["sizes"]
    by_size = {str(size): summarise_size([result["sizes"][str(size)] for result in found], size) for size in sizes}
    trained = [result["training"] for result in found if result["training"]]
    return {
        "seeds": [result["seed"] for result in found],
        "training": {key: mean([one[key] for one in trained]) for key in ("steps", "problems", "tokens")} if trained else None,
        "kept": [kept(result, base) for result in found],
        "seconds": mean([sum(result["seconds"].values()) for result in found]),
        "sizes": by_size,
        "area": [area(result, min(sizes)) for result in found],
        "law": law(found, sizes),
    }


def kept(result: Result, base: Result) -> float | None:
    """The least share of the base's accuracy that is left at any N the cell was trained at, on problems of the difficulties it was trained
    on: what tells a collapse from being used otherwise than trained. None for the base."""
    if result["training"] is None:
        return None
    levels = [f"{operations:g}" for operations in result["config"]["data.operations"]]
    shares = []
    for size in {str(size) for size in result["config"]["bundles.sizes"]} & result["sizes"].keys():
        ours, theirs = (one["sizes"][size]["by_difficulty"] for one in (result, base))
        problems = {level: theirs[level]["problems"] for level in levels if level in theirs}
        right = [math.fsum(group[level]["accuracy"] * count for level, count in problems.items()) for group in (ours, theirs)]
        shares.append(right[0] / max(right[1], 1e-9))
    return rounded(min(shares)) if shares else None


def summarise_size(cells: Sequence[Result], size: int) -> Summary:
    """One N over the seeds."""
    return {
        "accuracy": estimate(mean_interval(by_prompt([correct(cell["outcomes"]) for cell in cells], size))),
        "tokens": estimate(mean_interval(by_prompt([cell["tokens"] for cell in cells], size))),
        "by_seed": {
            "accuracy": [rounded(mean(correct(cell["outcomes"]))) for cell in cells],
            "tokens": [rounded(mean(cell["tokens"])) for cell in cells],
        },
        **{name: mean_of_some([cell[name] for cell in cells]) for name in AVERAGED},
        "cut": {budget: mean([mean(correct(cell["cut"][budget])) for cell in cells]) for budget in cells[0]["cut"]},
        "by_difficulty": over_seeds([cell["by_difficulty"] for cell in cells]),
        "by_position": over_seeds([cell["by_position"] for cell in cells]),
    }


def over_seeds(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean accuracy and tokens of each group over the seeds; the seeds have the same groups, for they were asked the same problems."""
    return {
        key: {name: mean([group[key][name] for group in groups]) for name in ("accuracy", "tokens")}
        | {"problems": groups[0][key]["problems"]}
        for key in groups[0]
    }


def compared(one: str, control: str, results: Mapping[str, Sequence[Result]]) -> Summary:
    """Accuracy and tokens of `one` less those of `control`, on the same problems."""
    ours, theirs = same_seeds(results[one], results[control])
    measurement = ours[0]["measurement"]
    sizes = {}
    for size in map(str, measurement["sizes"]):
        cells = [(mine["sizes"][size], other["sizes"][size]) for mine, other in zip(ours, theirs, strict=True)]
        found = {
            "accuracy": difference(cells, int(size), lambda cell: correct(cell["outcomes"])),
            "tokens": difference(cells, int(size), lambda cell: cell["tokens"]),
        }
        if SHARED_BUDGET in measurement["cut_at"]:
            found["shared"] = difference(cells, int(size), lambda cell: correct(cell["cut"][str(SHARED_BUDGET)]))
        sizes[size] = found
    single = str(min(measurement["sizes"]))
    hardest = max(ours[0]["difficulties"])
    places = [place for place, difficulty in enumerate(ours[0]["difficulties"]) if difficulty == hardest]
    pairs = [(mine["sizes"][single], other["sizes"][single]) for mine, other in zip(ours, theirs, strict=True)]
    return {
        "one": one,
        "control": control,
        "seeds": [result["seed"] for result in ours],
        "sizes": sizes,
        "hardest": difference(pairs, 1, lambda cell: np.asarray(correct(cell["outcomes"]))[places].tolist()) if single == "1" else None,
    }


def same_seeds(ours: Sequence[Result], theirs: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """Results side by side: seed by seed, or with the one measurement of the base (or of another cell without a seed in common)."""
    by_seed = {result["seed"]: result for result in theirs}
    shared = [result for result in ours if result["seed"] in by_seed]
    if theirs[0]["training"] is None or not shared:
        return list(ours), [theirs[0]] * len(ours)
    return shared, [by_seed[result["seed"]] for result in shared]


def difference(cells: Sequence[tuple[Result, Result]], size: int, values: Callable[[Result], Sequence[float]]) -> Summary:
    ours, theirs = ([values(pair[side]) for pair in cells] for side in (0, 1))
    return {
        "difference": estimate(paired_difference(by_prompt(ours, size), by_prompt(theirs, size))),
        "by_seed": [rounded(mean(mine) - mean(other)) for mine, other in zip(ours, theirs, strict=True)],
    }


def by_prompt(seeds: Sequence[Sequence[float]], size: int) -> list[float]:
    """`seeds[k][p]` of problem p under seed k -> the mean of each prompt of `size` problems in their order.

    >>> by_prompt([[1, 0, 1, 1], [1, 1, 1, 1]], 2)
    [0.75, 1.0]
    """
    table = list(zip(*seeds, strict=True))
    return [mean_at_k(table[start : start + size]) for start in range(0, len(table), size)]


def correct(outcomes: str) -> list[float]:
    return [float(letter == "c") for letter in outcomes]


def area(result: Result, size: int) -> float | None:
    """Under the accuracy-token curve at the smallest N, from its cuts up to the roomy budget."""
    cell, roomy = result["sizes"][str(size)], result["measurement"]["roomy"] * size
    budgets = sorted(budget for budget in map(int, cell["cut"]) if budget <= roomy)
    if len(budgets) < 2:
        return None
    return rounded(area_under_curve(budgets, [mean(correct(cell["cut"][str(budget)])) for budget in budgets]))


def law(found: Sequence[Result], sizes: Sequence[int]) -> Summary | None:
    """The task-scaling law of the mean over seeds, and the exponent of each seed; `falls`: N = max against N = min in every seed."""
    if len(sizes) < 2:
        return None
    tokens = [[mean(result["sizes"][str(size)]["tokens"]) for size in sizes] for result in found]
    fitted = asdict(fit_scaling_law(sizes, [mean(column) for column in zip(*tokens, strict=True)]))
    return {
        **{key: rounded(value) if isinstance(value, float) else value for key, value in fitted.items() if key != "residuals"},
        "residuals": [rounded(value) for value in fitted["residuals"]],
        "by_seed": [rounded(fit_scaling_law(sizes, row).exponent) for row in tokens],
        "monotone_by_seed": [fit_scaling_law(sizes, row).monotone for row in tokens],
        "last_less_first": last_less_first(found, sizes),
    }


def last_less_first(found: Sequence[Result], sizes: Sequence[int]) -> Summary:
    """Tokens of a problem at the largest N less those at the smallest, on the same problems, by prompts of the largest."""
    last, first = str(max(sizes)), str(min(sizes))
    cells = [(result["sizes"][last], result["sizes"][first]) for result in found]
    return difference(cells, max(sizes), lambda cell: cell["tokens"])


def estimate(found: Estimate) -> list[float]:
    return [rounded(found.value), rounded(found.low), rounded(found.high)]


def mean(values: Sequence[float]) -> float:
    return rounded(math.fsum(values) / len(values))


def mean_of_some(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def rounded(value: float) -> float:
    return round(float(value), 5)
