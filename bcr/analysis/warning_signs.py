"""What goes wrong in a training that shortens answers, told from its metrics: pure functions of series over the steps, newest last.

After "The Art of Efficient Reasoning" (arXiv 2602.20945). A good run has two stages (`report/stages.py`): first the length falls, and the
entropy with it, then the length stays, accuracy rises, and the entropy rises a little. Two ways to leave that path are looked for:

    length collapse     answers go on getting shorter and the accuracy is lost with them: the trap that short is correct
    entropy explosion   the entropy rises far beyond where it began

A sign is a large change between means over windows of steps, and one that stands out from the scatter of single steps, for every run
wanders and accuracy may dip while the length adapts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 5  # steps
CLEAR = 4.0  # standard errors that a change must have
SHORTER, LEFT = 0.8, 2 / 3  # collapse: at most so much of the length and of the accuracy of the best window
EXPLODED, ROSE, FLOOR = (
    1.5,
    2.0,
    0.1,
)  # explosion: so many times the first window, so many times the lowest; nats, below which none is called one

COLLAPSE, EXPLOSION = "length_collapse", "entropy_explosion"
NAMES = {COLLAPSE: "Length collapse", EXPLOSION: "Entropy explosion"}
ADVICE = {
    COLLAPSE: (
        "Answers get shorter and wrong: short has become what is rewarded. Go back to a checkpoint before it and make right answers "
        "frequent enough to outweigh that: easier problems (bcr.difficulty; at most half of the rollouts wrong), a roomier bundles.budget, "
        "a larger bundles.group, a reward without a word on length. Wrong rollouts have to stay in the loss."
    ),
    EXPLOSION: (
        "The policy turns random. Go back to a checkpoint before it; stay on-policy (off_policy.updates=1, off_policy.staleness=0), leave "
        "out problems that are nearly always answered wrongly (bcr.difficulty), keep wrong rollouts in the loss, lower optimizer.lr."
    ),
}


@dataclass(frozen=True)
class Sign:
    """`first`: index of the first step at which it shows; `lasts`: whether it still does at the last."""

    kind: str
    first: int
    lasts: bool


def length_collapse(tokens: Sequence[float], accuracy: Sequence[float], window: int = WINDOW) -> bool:
    """Whether the last `window` steps have lost a third of the accuracy of the best window before them, with answers a fifth shorter."""
    if len(accuracy) < 2 * window:
        return False
    accuracies, lengths = means(accuracy, window), means(tokens, window)
    best = int(np.argmax(accuracies[:-window]))
    small = accuracies[-1] <= LEFT * accuracies[best] and lengths[-1] <= SHORTER * lengths[best]
    return bool(
        small
        and accuracies[best] - accuracies[-1] > CLEAR * error(accuracy, window)
        and lengths[best] - lengths[-1] > CLEAR * error(tokens, window)
    )


def entropy_explosion(entropy: Sequence[float], window: int = WINDOW) -> bool:
    """Whether the last `window` steps have half as much again of the first ones' entropy and twice the lowest, and more than a little."""
    if len(entropy) < 2 * window:
        return False
    found = means(entropy, window)
    now, lowest = found[-1], found[:-window].min()
    return bool(now >= FLOOR and now >= EXPLODED * found[0] and now >= ROSE * lowest and now - lowest > CLEAR * error(entropy, window))


def means(series: Sequence[float], window: int) -> NDArray[np.float64]:
    """Of every `window` steps in a row, by the first of them."""
    return np.convolve(np.asarray(series, dtype=float), np.full(window, 1 / window), mode="valid")


def error(series: Sequence[float], window: int) -> float:
    """Standard error of the difference of two such means, from how far apart neighbouring steps are."""
    apart = np.diff(np.asarray(series, dtype=float))
    return float(np.sqrt(np.mean(apart**2) / 2) * math.sqrt(2 / window))


def signs(steps: Sequence[Mapping[str, Any]]) -> list[Sign]:
    """In a run's metrics.jsonl, as they would have been seen step by step; steps without an entropy are passed over for that sign."""
    tokens, accuracy = ([float(step[name]) for step in steps] for name in ("tokens_per_problem", "accuracy"))
    known = [index for index, step in enumerate(steps) if is_number(step.get("entropy"))]
    entropy = [float(steps[index]["entropy"]) for index in known]
    found = [
        seen(COLLAPSE, range(len(steps)), lambda stop: length_collapse(tokens[:stop], accuracy[:stop])),
        seen(EXPLOSION, known, lambda stop: entropy_explosion(entropy[:stop])),
    ]
    return [sign for sign in found if sign is not None]


def seen(kind: str, places: Sequence[int], shows: Callable[[int], bool]) -> Sign | None:
    """`shows(stop)`: whether it shows in the first `stop` entries, which are those of the steps at `places`."""
    stops = [stop for stop in range(1, len(places) + 1) if shows(stop)]
    return Sign(kind, places[stops[0] - 1], stops[-1] == len(places)) if stops else None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
