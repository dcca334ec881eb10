"""Measures of judged rollouts: pure functions from records to numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bcr.records import Verdict
from bcr.tasks.judging import Judged


def summarise(rollouts: Sequence[Judged]) -> dict[str, Any]:
    """Means over the problems of the rollouts.

    `accuracy` with its standard error (problems taken as independent), `tokens_per_problem` (all completion tokens, rambling
    included, over the number of problems asked) with its standard error (rollouts taken as independent), `checks_per_problem`, and
    the share of each verdict; `truncated` is a share of rollouts, `entropy` the mean of -log p over the sampled tokens [nats per
    token], an unbiased estimate of the policy's entropy.
    `tokens_correct` and `tokens_wrong` split length by outcome: tokens of all segments of a problem, averaged over the correct ones and
    over all others that were opened; None where there are none.
    """
    if not rollouts:
        raise ValueError("there are no rollouts to summarise.")
    verdicts = Counter(verdict for judged in rollouts for verdict in judged.verdicts)
    problems = sum(verdicts.values())
    tokens = sum(len(judged.rollout.token_ids) for judged in rollouts)
    accuracy = verdicts[Verdict.CORRECT] / problems
    lengths = [(verdict, length) for judged in rollouts for verdict, length in problem_lengths(judged)]
    return {
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(accuracy * (1 - accuracy) / problems),
        "tokens_per_problem": tokens / problems,
        "tokens_per_problem_se": ratio_error(
            [len(judged.rollout.token_ids) for judged in rollouts], [len(judged.verdicts) for judged in rollouts]
        ),
        "tokens_correct": mean([length for verdict, length in lengths if verdict is Verdict.CORRECT]),
        "tokens_wrong": mean([length for verdict, length in lengths if verdict is not Verdict.CORRECT]),
        "checks_per_problem": sum(judged.checks for judged in rollouts) / problems,
        "problems": problems,
        "truncated": sum(judged.rollout.finish == "length" for judged in rollouts) / len(rollouts),
        **{verdict.value: verdicts[verdict] / problems for verdict in Verdict if verdict is not Verdict.CORRECT},
        "entropy": -math.fsum(logprob for judged in rollouts for logprob in judged.rollout.logprobs) / tokens,
    }


def ratio_error(amounts: Sequence[float], counts: Sequence[float]) -> float:
    """Standard error of sum(amounts) / sum(counts) over independent pairs (Cochran, Sampling Techniques, ch. 6); 0 for one pair.

    >>> ratio_error([10.0, 14.0], [1, 1])  # the standard error of a mean
    2.0
    """
    ratio, pairs = sum(amounts) / sum(counts), len(counts)
    squares = math.fsum((amount - ratio * count) ** 2 for amount, count in zip(amounts, counts, strict=True))
    return math.sqrt(squares * pairs / max(1, pairs - 1)) / sum(counts)


def problem_lengths(judged: Judged) -> list[tuple[Verdict, int]]:
    """(verdict, tokens of its segments) of every problem that the rollout opened, in prompt order."""
    return [(verdict, tokens) for verdict, tokens in zip(judged.verdicts, judged.tokens_by_problem, strict=True) if tokens]


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval for a share of `count` independent trials (95 % by default): inside [0, 1], also at 0 and 1.

    >>> wilson(0.0, 96)[0], round(wilson(0.0, 96)[1], 3)
    (0.0, 0.038)
    """
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def hardest_problems(tight: Sequence[Judged], capped: Sequence[Judged], cap: int) -> dict[str, Any]:
    """How the hardest problems (highest difficulty) fare under a shared budget and under the same cap for each, both measured at N = 1.

    `tokens_needed` is the mean length of their correct answers after training on the shared budget; None where there are none.
    """
    hardest = max(judged.bundle.problems[0].difficulty or 0.0 for judged in tight)
    found = {name: by_difficulty(rollouts) for name, rollouts in (("bcr_tight", tight), ("same_cap", capped))}
    return {
        "cap": cap,
        "operations": int(hardest),
        "tokens_needed": found["bcr_tight"][hardest]["tokens_correct"],
        "accuracy": {name: groups[hardest]["accuracy"] for name, groups in found.items()},
        "by_operations": {name: {str(int(level)): measures for level, measures in groups.items()} for name, groups in found.items()},
    }


def by_difficulty(rollouts: Sequence[Judged]) -> dict[float, dict[str, Any]]:
    """`summarise` of the rollouts of single problems, for each difficulty, the easiest first."""
    levels = sorted({judged.bundle.problems[0].difficulty or 0.0 for judged in rollouts})
    return {level: summarise([judged for judged in rollouts if (judged.bundle.problems[0].difficulty or 0.0) == level]) for level in levels}
