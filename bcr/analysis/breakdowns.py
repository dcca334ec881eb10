"""The same rollouts seen from several sides: by place in the bundle, by difficulty, and under tighter token budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bcr.analysis.measures import mean
from bcr.records import Rollout, Verdict
from bcr.tasks.dialect import Dialect
from bcr.tasks.judging import Grader, Judged, judge

Group = Mapping[str, float | int | None]


def by_position(rollouts: Sequence[Judged]) -> dict[float, Group]:
    """Position in the bundle, from 1 -> accuracy, tokens of the problem, number of problems."""
    return broken_down(rollouts, lambda judged, place: place + 1)


def by_difficulty(rollouts: Sequence[Judged]) -> dict[float, Group]:
    """Difficulty -> the same; problems without one are left out."""
    return broken_down(rollouts, lambda judged, place: judged.bundle.problems[place].difficulty)


def broken_down(rollouts: Sequence[Judged], key: Callable[[Judged, int], float | None]) -> dict[float, Group]:
    """Problems grouped by `key(rollout, place in the bundle)`, in rising order; None is no group."""
    groups: dict[float, list[tuple[Verdict, int]]] = {}
    for judged in rollouts:
        for place, outcome in enumerate(zip(judged.verdicts, judged.tokens_by_problem, strict=True)):
            value = key(judged, place)
            if value is not None:
                groups.setdefault(value, []).append(outcome)
    return {
        value: {
            "accuracy": mean([float(verdict is Verdict.CORRECT) for verdict, _ in groups[value]]),
            "tokens": mean([float(tokens) for _, tokens in groups[value]]),
            "problems": len(groups[value]),
        }
        for value in sorted(groups)
    }


def under_budgets(rollouts: Sequence[Judged], budgets: Sequence[int], dialect: Dialect, grader: Grader) -> dict[int, list[Judged]]:
    """What the same completions would have been worth under tighter budgets: each cut to its first B tokens and judged anew.

    One long run serves all budgets (the Art of Efficient Reasoning, arXiv 2602.20945, judges at 2k to 32k). It is exact, for sampling does
    not know its budget: a model that is cut at B says the same first B tokens.
    """
    if not budgets or min(budgets) < 1:
        raise ValueError(f"budgets is {list(budgets)}; name at least one of 1 token or more.")
    result = {}
    for budget in sorted(set(budgets)):
        bundles = [replace(judged.bundle, budget=min(budget, judged.bundle.budget)) for judged in rollouts]
        cut = [[truncated(judged.rollout, budget)] for judged in rollouts]
        result[budget] = [judged for (judged,) in judge(bundles, cut, dialect, grader)]
    return result


def truncated(rollout: Rollout, budget: int) -> Rollout:
    """The rollout as it would have been with a cap of `budget` tokens."""
    if len(rollout.token_ids) <= budget:
        return rollout
    return replace(rollout, token_ids=rollout.token_ids[:budget], logprobs=rollout.logprobs[:budget], finish="length")
