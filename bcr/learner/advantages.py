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
    """`scope` "rollout" or "problem"; `normalise_std` False is Dr.GRPO's; `discount` applies to scope "problem".

    `std_of` "group" divides by the standard deviation of the group (GRPO), "batch" by that of everything sampled for the step (DLER).
    """

    scope: str = "rollout"
    normalise_std: bool = True
    std_of: str = "group"
    discount: float = 1.0

    def check(self) -> None:
        if self.scope not in ("rollout", "problem"):
            raise ValueError(f"advantage.scope is {self.scope!r}; it must be 'rollout' or 'problem'.")
        if self.std_of not in ("group", "batch"):
            raise ValueError(f"advantage.std_of is {self.std_of!r}; it must be 'group' or 'batch'.")
        if self.std_of == "batch" and not self.normalise_std:
            raise ValueError("advantage.std_of is 'batch', but advantage.normalise_std is false: no standard deviation is used.")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"advantage.discount is {self.discount}; it must lie between 0 and 1.")


def batch_advantages(
    rewards: Sequence[Sequence[Sequence[float]]], segments: Sequence[Sequence[Sequence[Segment]]], config: AdvantageConfig
) -> list[list[list[float]]]:
    """One advantage for each segment of each rollout of each group of a step; see `group_advantages`, which takes a group at a time.

    With `std_of` "batch" (REINFORCE++ with the group's mean as baseline, as in DLER, arXiv 2510.15110) the scores are centred in their
    group and divided by the sample standard deviation of all centred scores of the step. Their mean is 0, each group's being 0. All groups
    are alike in scale then: one with a single success among failures does not weigh more than one with many. Equal scores still give 0.
    """
    std = batch_deviation(rewards, config) if config.std_of == "batch" else None
    return [group_advantages(rows, spans, config, std) for rows, spans in zip(rewards, segments, strict=True)]


def group_advantages(
    rewards: Sequence[Sequence[float]], segments: Sequence[Sequence[Segment]], config: AdvantageConfig, std: float | None = None
) -> list[list[float]]:
    """One advantage for each segment of each of the G rollouts of a group.

    `rewards[g][j]` is the reward of problem j in rollout g; `segments[g]` are that rollout's segments in completion order. `std` takes
    the place of the group's own standard deviation.

    >>> first, second = Segment(0, 0, 5), Segment(1, 5, 9)
    >>> group_advantages([[1, 1], [1, 0]], [[first, second], [first, second]], AdvantageConfig(normalise_std=False))
    [[0.25, 0.25], [-0.25, -0.25]]
    """
    columns = [normalise(column, config.normalise_std, std) for column in scores(rewards, config)]
    if config.scope == "rollout":
        return [[columns[0][g]] * len(spans) for g, spans in enumerate(segments)]
    return [[columns[j][g] for j in responsible_problems(spans)] for g, spans in enumerate(segments)]


def scores(rewards: Sequence[Sequence[float]], config: AdvantageConfig) -> list[list[float]]:
    """What is compared within a group, as columns of G numbers: one column of mean rewards (scope rollout), or one of returns for each
    problem (scope problem)."""
    if config.scope == "rollout":
        return [[sum(row) / len(row) for row in rewards]]
    return [list(column) for column in zip(*(discounted_returns(row, config.discount) for row in rewards), strict=True)]


def batch_deviation(rewards: Sequence[Sequence[Sequence[float]]], config: AdvantageConfig) -> float:
    """The sample standard deviation of all scores of a step, each less the mean of its group."""
    centred = [value for group in rewards for column in scores(group, config) for value in normalise(column, by_std=False)]
    return math.sqrt(math.fsum(value * value for value in centred) / (len(centred) - 1))


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


def normalise(scores: Sequence[float], by_std: bool, std: float | None = None) -> list[float]:
    """Scores less their mean, over their sample standard deviation if asked (GRPO, DeepSeekMath eq. 3), or over `std` where one is given.

    Equal scores give exactly 0.
    """
    if max(scores) == min(scores):
        return [0.0] * len(scores)
    mean = math.fsum(scores) / len(scores)
    centred = [score - mean for score in scores]
    if not by_std:
        return centred
    if std is None:
        std = math.sqrt(math.fsum(c * c for c in centred) / (len(scores) - 1))
    return [c / (std + EPSILON) for c in centred]
