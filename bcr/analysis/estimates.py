"""How sure a figure is: accuracy over k samples, and bootstrap intervals that resample problems, never single answers.

A table of outcomes is `outcomes[p][k]`: 1 where sample k of problem p is correct, else 0. Samples of one problem resemble each other, so
the problem is the unit; two models measured on the same problems are compared problem by problem.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Outcomes = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its interval at the stated level."""

    value: float
    low: float
    high: float


def mean_at_k(outcomes: Outcomes) -> float:
    """The mean over problems of the share of correct samples (Mean@k)."""
    return math.fsum(math.fsum(row) / len(row) for row in outcomes) / len(outcomes)


def pass_at_k(outcomes: Outcomes, k: int) -> float:
    """The chance that one of k samples is correct, without bias: 1 - C(n - c, k) / C(n, k) over problems with c of n correct
    (Chen et al. 2021, arXiv 2107.03374, eq. 1). ValueError where a problem has fewer than k samples.

    >>> pass_at_k([[1, 0, 0, 0]], 2)
    0.5
    """
    short = min(map(len, outcomes))
    if not 1 <= k <= short:
        raise ValueError(f"k is {k}; it must lie between 1 and the number of samples, {short}.")
    missed = [math.comb(len(row) - round(math.fsum(row)), k) / math.comb(len(row), k) for row in outcomes]
    return 1 - math.fsum(missed) / len(missed)


def interval(
    rows: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Percentile bootstrap (Efron) over `rows`, one row of numbers a problem.

    `statistic` takes [..., P, C], the P rows that were drawn with their C columns, and gives [...]: `lambda x: x[..., 0].mean(-1)` is a
    mean, `lambda x: x[..., 0].sum(-1) / x[..., 1].sum(-1)` a ratio.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1.")
    table = np.asarray(rows, dtype=float)
    generator = np.random.default_rng(seed)
    drawn = np.concatenate([statistic(table[generator.integers(len(table), size=(100, len(table)))]) for _ in range(-(-resamples // 100))])
    low, high = np.quantile(drawn[:resamples], [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(statistic(table)), float(low), float(high))


def mean_interval(values: Sequence[float], **options: float | int) -> Estimate:
    """Of the mean of one number a problem."""
    return interval([[value] for value in values], lambda drawn: drawn[..., 0].mean(-1), **options)  # type: ignore[arg-type]


def paired_difference(ours: Sequence[float], theirs: Sequence[float], **options: float | int) -> Estimate:
    """Of mean(ours) - mean(theirs) on the same problems in the same order: what the problems share in difficulty cancels."""
    if len(ours) != len(theirs):
        raise ValueError(f"there are {len(ours)} problems on one side and {len(theirs)} on the other; a paired difference needs the same.")
    return mean_interval([mine - other for mine, other in zip(ours, theirs, strict=True)], **options)


def area_under_curve(tokens: Sequence[float], accuracy: Sequence[float]) -> float:
    """Mean accuracy over the logarithm of the token budget, by the trapezium rule: 1 for a model that is right at every budget.

    `tokens` rise. Logarithmic, because budgets are doubled: 2k to 4k counts as much as 16k to 32k.
    """
    if len(tokens) != len(accuracy) or len(tokens) < 2 or any(b <= a for a, b in itertools.pairwise(tokens)) or tokens[0] <= 0:
        raise ValueError(f"tokens is {list(tokens)}; an area needs two budgets or more, positive and rising, and an accuracy for each.")
    places = np.log(tokens)
    return float(np.trapezoid(accuracy, places) / (places[-1] - places[0]))
