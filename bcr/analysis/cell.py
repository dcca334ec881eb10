"""Everything that is said of one cell of an evaluation: one data set, one N, one budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bcr.analysis.breakdowns import by_difficulty, by_position, under_budgets
from bcr.analysis.estimates import area_under_curve, interval, pass_at_k
from bcr.analysis.loops import count_loops, repetition
from bcr.analysis.measures import summarise
from bcr.analysis.scaling_law import fit_scaling_law
from bcr.records import Verdict
from bcr.tasks.dialect import Dialect
from bcr.tasks.judging import Grader, Judged


def describe(rollouts: Sequence[Judged], dialect: Dialect) -> dict[str, Any]:
    """`summarise`, and: counts of `verdicts`; the bootstrap `accuracy_interval` (95 %); `pass_at_k` with intervals where each problem was
    asked more than once, for k = 2, 4, 8, ... and all times; accuracy and tokens `by_position` and `by_difficulty`; `loops_per_thousand`
    tokens, the share of completions `with_loops`, and `repetition` (8-grams)."""
    outcomes, units = outcomes_by_problem(rollouts), independent_units(rollouts)
    times = min(map(len, outcomes.values()))
    counted = Counter(verdict for judged in rollouts for verdict in judged.verdicts)
    completions = [judged.rollout.token_ids for judged in rollouts]
    tokens = sum(map(len, completions))
    loops = [count_loops(dialect.tokenizer.decode(completion, skip_special_tokens=False)) for completion in completions]
    at = sorted({*(1 << power for power in range(1, times.bit_length())), times}) if times > 1 else []
    chances = {str(k): {name: pass_at_k([row], k) for name, row in outcomes.items()} for k in at}
    passed = {
        "pass_at_k": {k: math.fsum(found.values()) / len(found) for k, found in chances.items()},
        "pass_at_k_interval": {k: interval_over(units, found) for k, found in chances.items()},
    }
    return {
        "verdicts": {verdict.value: counted[verdict] for verdict in Verdict},
        **summarise(rollouts),
        "accuracy_interval": interval_over(units, {name: math.fsum(row) / len(row) for name, row in outcomes.items()}),
        **(passed if at else {}),
        "by_position": {str(int(place)): found for place, found in by_position(rollouts).items()},
        "by_difficulty": {f"{level:g}": found for level, found in by_difficulty(rollouts).items()},
        "loops_per_thousand": 1000 * sum(loops) / tokens,
        "with_loops": sum(count > 0 for count in loops) / len(loops),
        "repetition": math.fsum(repetition(completion) for completion in completions) / len(completions),
    }


def independent_units(rollouts: Sequence[Judged]) -> dict[str, str]:
    """Problem id -> the unit that a bootstrap draws it with: its prompt, or itself where it stands in several (REST's bundles)."""
    prompts: dict[str, set[str]] = {}
    for judged in rollouts:
        for problem in judged.bundle.problems:
            prompts.setdefault(problem.id, set()).add(judged.bundle.id)
    alone = all(len(names) == 1 for names in prompts.values())
    return {name: min(names) if alone else name for name, names in prompts.items()}


def interval_over(units: Mapping[str, str], values: Mapping[str, float]) -> list[float]:
    """Of the mean of one number a problem, at 95 %; problems of one unit are drawn together."""
    rows: dict[str, list[float]] = {}
    for name, value in values.items():
        row = rows.setdefault(units[name], [0.0, 0.0])
        row[0] += value
        row[1] += 1
    found = interval(list(rows.values()), lambda drawn: drawn[..., 0].sum(-1) / drawn[..., 1].sum(-1))
    return [found.low, found.high]


def outcomes_by_problem(rollouts: Sequence[Judged]) -> dict[str, list[float]]:
    """Problem id -> 1 or 0 for every time it was asked."""
    outcomes: dict[str, list[float]] = {}
    for judged in rollouts:
        for problem, reward in zip(judged.bundle.problems, judged.rewards, strict=True):
            outcomes.setdefault(problem.id, []).append(reward)
    return outcomes


def budget_curve(rollouts: Sequence[Judged], budgets: Sequence[int], dialect: Dialect, grader: Grader) -> dict[str, Any]:
    """What the same completions are worth when cut to fewer tokens: accuracy by budget, and the area under that curve."""
    curve = {budget: summarise(judged)["accuracy"] for budget, judged in under_budgets(rollouts, budgets, dialect, grader).items()}
    area = area_under_curve(list(curve), list(curve.values())) if len(curve) > 1 else None
    return {"accuracy_under_budgets": {str(budget): accuracy for budget, accuracy in curve.items()}, "area_under_budgets": area}


def scaling_laws(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The task-scaling law for each data set and budget that was measured at two N or more.

    Only for budgets that grow with N: under one fixed total, tokens per problem fall because completions are cut off.
    """
    families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["budget_per_problem"] is not None:
            families.setdefault((cell["data"], cell["budget_per_problem"]), []).append(cell)
    return [
        {"data": data, "budget_per_problem": each}
        | asdict(fit_scaling_law([cell["n"] for cell in family], [cell["tokens_per_problem"] for cell in family]))
        for (data, each), family in families.items()
        if len({cell["n"] for cell in family}) > 1
    ]
