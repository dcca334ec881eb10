"""The task-scaling law: how tokens per problem depend on N, the number of problems in a prompt."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ScalingLaw:
    """tokens(N) = scale * N ** -exponent. `residuals` are log(measured / fitted) at each N; `exponent_se` is None for two points.

    The paper (arXiv 2604.02322) states that tokens per problem fall monotonically with N and gives no form; a power law is the simplest
    that can say how fast. `monotone` is whether the measured tokens themselves fall at every step, which is the claim.
    """

    scale: float
    exponent: float
    exponent_se: float | None
    residuals: tuple[float, ...]
    monotone: bool

    def tokens(self, n: float) -> float:
        return self.scale * n**-self.exponent


def fit_scaling_law(sizes: Sequence[int], tokens: Sequence[float]) -> ScalingLaw:
    """Least squares of log tokens over log N. ValueError for fewer than two different N, or tokens that are not positive.

    >>> law = fit_scaling_law([1, 2, 4], [80.0, 40.0, 20.0])
    >>> round(law.exponent, 6), round(law.tokens(8), 6), law.monotone
    (1.0, 10.0, True)
    """
    if len(sizes) != len(tokens) or len(set(sizes)) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes is {list(sizes)}; a scaling law needs tokens at two different N or more.")
    if min(tokens) <= 0:
        raise ValueError(f"tokens is {list(tokens)}; a scaling law needs positive numbers.")
    x, y = np.log(sizes), np.log(tokens)
    spread = x - x.mean()
    slope = float(spread @ y / (spread @ spread))
    intercept = float(y.mean() - slope * x.mean())
    residuals = y - intercept - slope * x
    freedom = len(sizes) - 2
    error = math.sqrt(float(residuals @ residuals) / freedom / float(spread @ spread)) if freedom else None
    ordered = [amount for _, amount in sorted(zip(sizes, tokens, strict=True))]
    falling = all(later < earlier for earlier, later in itertools.pairwise(ordered))
    return ScalingLaw(math.exp(intercept), -slope, error, tuple(map(float, residuals)), falling)
