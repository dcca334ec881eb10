"""Advantages: how much better than its group a rollout, or one problem's part of it, turned out.

`scope: rollout` is the paper's: the mean accuracy over the N problems, normalised in the group, on every token.

`scope: problem` gives a segment the return of the first problem that it could still help or harm: the discounted sum of the
rewards of problems j, j+1, ... of the bundle in prompt order, normalised over all G rollouts at that j, also those that never got
there. A problem never reached has reward 0, so the segments before it bear its loss: they spent its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bcr.records import Segment

EPSILON = 1e-4  # on the standard deviation, as in verl and TRL


@dataclass
class AdvantageConfig:
    """`scope` "rollout" or "problem"; `normalise_std` False is Dr.GRPO's; `discount` applies to scope "problem"."""

    scope: str = "rollout"
    normalise_std: bool = True
    discount: float = 1.0

    def check(self) -> None:
        if self.scope not in ("rollout", "problem"):
            raise ValueError(f"advantage.scope is {self.scope!r}; it must be 'rollout' or 'problem'.")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"advantage.discount is {self.discount}; it must lie between 0 and 1.")


def group_advantages(
    rewards: Sequence[Sequence[float]], segments: Sequence[Sequence[Segment]], config: AdvantageConfig
) -> list[list[float]]:
    """One advantage for each segment of each of the G rollouts of a group.

    `rewards[g][j]` is the reward of problem j in rollout g; `segments[g]` are that rollout's segments in completion order.

    >>> first, second = Segment(0, 0, 5), Segment(1, 5, 9)
    >>> group_advantages([[1, 1], [1, 0]], [[first, second], [first, second]], AdvantageConfig(normalise_std=False))
    [[0.25, 0.25], [-0.25, -0.25]]
    """
    if config.scope == "rollout":
        scores = [sum(row) / len(row) for row in rewards]
        return [[advantage] * len(spans) for advantage, spans in zip(normalise(scores, config.normalise_std), segments, strict=True)]
    returns = [discounted_returns(row, config.discount) for row in rewards]
    num_problems = len(returns[0])
    by_problem = [normalise([row[j] for row in returns], config.normalise_std) for j in range(num_problems)]
    return [[by_problem[j][g] for j in responsible_problems(spans)] for g, spans in enumerate(segments)]


def responsible_problems(segments: Sequence[Segment]) -> list[int]:
    """For each segment the first problem it is answerable for: its own, or an earlier one that has not been answered before it.

    In prompt order, each problem answered, that is the segment's own problem. Out of order, or after a problem that was left without an
    answer, it is the smallest problem still open, because the segment spends tokens which that problem needs: nothing is gained by
    writing an easy answer first, by skipping, or by headings with nothing under them. Returning to a problem that was answered before
    is answerable from that problem on.

    >>> responsible_problems([Segment(2, 0, 4), Segment(0, 4, 9), Segment(1, 9, 12), Segment(0, 12, 15)])
    [0, 0, 1, 0]
    >>> responsible_problems([Segment(0, 0, 4, answered=False), Segment(1, 4, 9), Segment(2, 9, 12)])
    [0, 0, 0]
    """
    responsible, closed = [], set[int]()
    for segment in segments:
        first_open = next(j for j in range(len(closed) + 1) if j not in closed)
        responsible.append(min(segment.problem, first_open))
        if segment.answered:
            closed.add(segment.problem)
    return responsible


def discounted_returns(rewards: Sequence[float], discount: float) -> list[float]:
    """Reward-to-go over problems in prompt order.

    >>> discounted_returns([1.0, 0.0, 1.0], 0.5)
    [1.25, 0.5, 1.0]
    """
    returns, following = [], 0.0
    for reward in reversed(rewards):
        following = reward + discount * following
        returns.append(following)
    return returns[::-1]


def normalise(scores: Sequence[float], by_std: bool) -> list[float]:
    """Scores less their mean, over their sample standard deviation if asked (GRPO, DeepSeekMath eq. 3). Equal scores give exactly 0."""
    if max(scores) == min(scores):
        return [0.0] * len(scores)
    mean = math.fsum(scores) / len(scores)
    centred = [score - mean for score in scores]
    if not by_std:
        return centred
    std = math.sqrt(math.fsum(c * c for c in centred) / (len(scores) - 1))
    return [c / (std + EPSILON) for c in centred]
