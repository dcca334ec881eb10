"""Published rewards that look at the length: the rivals of BCR, each by its formula.

Everywhere L is the tokens of the problem's own segments, `correct` is 1 or 0, and a is `coefficient`. The papers know one problem a
rollout; with N > 1 each problem of a bundle is compared with the same problem in the other rollouts of the group. What is a bound in the
papers is `length`, in tokens. For one problem under a cap L is the whole completion.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bcr.tasks.judging import Judged

Settings = Any  # bcr.learner.rewards.RewardConfig, which cannot be imported from here
Outcome = tuple[float, int]  # correct, L


def by_problem(score: Callable[[Sequence[Outcome], Settings], list[float]]) -> Callable[[Sequence[Judged], Settings], list[list[float]]]:
    """A rule for whole groups out of one for the G outcomes of one problem."""

    def rule(group: Sequence[Judged], config: Settings) -> list[list[float]]:
        outcomes = [list(zip(judged.rewards, judged.tokens_by_problem, strict=True)) for judged in group]
        columns = [score(column, config) for column in zip(*outcomes, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]

    rule.__doc__ = score.__doc__
    return rule


@by_problem
def truncation(outcomes: Sequence[Outcome], config: Settings) -> list[float]:
    """correct * 1[L <= length] (ThinkPrune, arXiv 2504.01296; the Art of Efficient Reasoning, arXiv 2602.20945, its main reward)."""
    return [correct * (tokens <= config.length) for correct, tokens in outcomes]


@by_problem
def kimi(outcomes: Sequence[Outcome], config: Settings) -> list[float]:
    """correct + l where correct, min(0, l) where wrong; l = a (1/2 - (L - L_min) / (L_max - L_min)) over the group, 0 if all are equally
    long (Kimi k1.5, arXiv 2501.12599, section 2.3.3, in the form of arXiv 2602.20945; a = 0.4 there)."""
    lengths = [tokens for _, tokens in outcomes]
    least, span = min(lengths), max(lengths) - min(lengths)
    bonuses = [config.coefficient * (0.5 - (tokens - least) / span) if span else 0.0 for tokens in lengths]
    return [1.0 + bonus if correct else min(0.0, bonus) for (correct, _), bonus in zip(outcomes, bonuses, strict=True)]


@by_problem
def l1_max(outcomes: Sequence[Outcome], config: Settings) -> list[float]:
    """correct * clip(a (length - L) + 1/2, 0, 1) (L1-Max, arXiv 2503.04697, eq. 2; a = 3e-4 there, for lengths up to 4,000)."""
    return [correct * min(1.0, max(0.0, config.coefficient * (config.length - tokens) + 0.5)) for correct, tokens in outcomes]


@by_problem
def laser(outcomes: Sequence[Outcome], config: Settings) -> list[float]:
    """correct * (1 + a 1[L <= length]) (Laser, arXiv 2505.15612; a = 0.5 there)."""
    return [correct * (1 + config.coefficient * (tokens <= config.length)) for correct, tokens in outcomes]


@by_problem
def laser_d(outcomes: Sequence[Outcome], config: Settings) -> list[float]:
    """Laser, and a 1[L > length] where wrong, so that exploring long is not punished (Laser-D in the form of arXiv 2602.20945).

    In the original (arXiv 2505.15612) Laser-D is `laser` with targets that move with difficulty and training (`reward.moving`), and this
    rule with such targets is Laser-DE, but for its n-gram test that withholds the bonus from wrong answers which repeat themselves."""
    short = [tokens <= config.length for _, tokens in outcomes]
    return [
        1 + config.coefficient * within if correct else config.coefficient * (not within)
        for (correct, _), within in zip(outcomes, short, strict=True)
    ]


@by_problem
def arora_zanette(outcomes: Sequence[Outcome], config: Settings) -> list[float]:
    """correct * (1 - a sigmoid((L - mean) / std)), mean and standard deviation over the correct ones (arXiv 2502.04463; a = 0.1 there).

    Where all correct ones are equally long the sigmoid is that of 0.
    """
    lengths = [tokens for correct, tokens in outcomes if correct]
    if not lengths:
        return [0.0] * len(outcomes)
    mean, std = statistics.fmean(lengths), statistics.pstdev(lengths)
    return [
        correct * (1 - config.coefficient * sigmoid((tokens - mean) / std if std else 0.0)) if correct else 0.0
        for correct, tokens in outcomes
    ]


@by_problem
def shorter_better(outcomes: Sequence[Outcome], config: Settings) -> list[float]:
    """2 correct - a |L - L*|; L* is the shortest correct answer of the group, or the mean length where none is correct (ShorterBetter,
    arXiv 2504.21370; a = 1e-3 there, for lengths up to 6,000)."""
    lengths = [tokens for correct, tokens in outcomes if correct]
    target = min(lengths) if lengths else statistics.fmean(tokens for _, tokens in outcomes)
    return [2 * correct - config.coefficient * abs(tokens - target) for correct, tokens in outcomes]


@by_problem
def overlong(outcomes: Sequence[Outcome], config: Settings) -> list[float]:
    """correct + p, with p = 0 up to length - buffer, -1 beyond length, and a straight line between (DAPO, arXiv 2503.14476, eq. 13;
    length = 20,480 and buffer = 4,096 there)."""
    start = config.length - config.buffer
    return [correct - min(1.0, max(0.0, (tokens - start) / config.buffer)) for correct, tokens in outcomes]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
