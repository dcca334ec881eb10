"""The two stages of a training that shortens answers: length adaptation, then reasoning refinement.

The stages are those of "The Art of Efficient Reasoning" (arXiv 2602.20945): first the mean length falls, roughly exponentially, then it
stays while accuracy goes on rising. The change point is where a line and a plateau meet: the logarithm of tokens per problem is
fitted by least squares with

    log tokens(t) = level + slope * min(t - s, 0)          a straight fall until step s, a constant after it

for every s, and the s with the smallest squared error is taken. Whether there is such a bend at all is decided by the
Bayesian information criterion against a straight line and a constant, and by a fall of at least a tenth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FEWEST_STEPS = 10  # below it three models cannot be told apart
SMALLEST_FALL = 0.1


@dataclass(frozen=True)
class Stages:
    """`kind`: "two stages", "still falling" (no plateau yet) or "no fall". `change`: index of the first step of the plateau.

    `fit`: the fitted tokens per problem of every step; empty for "no fall".
    """

    kind: Literal["two stages", "still falling", "no fall"]
    change: int | None
    fit: list[float]


def find_stages(tokens: Sequence[float]) -> Stages:
    """`tokens[t]`: tokens per problem of step t, positive. Fewer than ten steps are never split."""
    none = Stages("no fall", None, [])
    if len(tokens) < FEWEST_STEPS or min(tokens) <= 0:
        return none
    steps, logs = np.arange(len(tokens), dtype=float), np.log(np.asarray(tokens, dtype=float))
    constant = fitted(np.ones((len(logs), 1)), logs)
    line = fitted(np.stack([np.ones_like(steps), steps], 1), logs)
    bends = {s: fitted(np.stack([np.ones_like(steps), np.minimum(steps - s, 0)], 1), logs) for s in range(2, len(logs) - 2)}
    change = min(bends, key=lambda s: squared(logs, bends[s]))
    bent = bends[change]
    scores = {
        "no fall": criterion(logs, constant, 1),
        "still falling": criterion(logs, line, 2),
        "two stages": criterion(logs, bent, 3),  # level, slope and s
    }
    best = min(scores, key=lambda kind: scores[kind])
    shape = bent if best == "two stages" else line
    if best == "no fall" or 1 - np.exp(shape[-1] - shape[0]) < SMALLEST_FALL:
        return none
    fit = [float(value) for value in np.exp(shape)]
    return Stages("two stages", change, fit) if best == "two stages" else Stages("still falling", None, fit)


def fitted(design: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    return design @ np.linalg.lstsq(design, values, rcond=None)[0]


def squared(values: NDArray[np.float64], fit: NDArray[np.float64]) -> float:
    return float(np.sum((values - fit) ** 2))


def criterion(values: NDArray[np.float64], fit: NDArray[np.float64], parameters: int) -> float:
    """Schwarz's information criterion of a least-squares fit; the floor keeps an exact fit finite."""
    n = len(values)
    return n * float(np.log(max(squared(values, fit) / n, 1e-12))) + parameters * float(np.log(n))
