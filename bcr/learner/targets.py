"""Laser-D's moving targets: one length for each class of difficulty, chosen anew from what the model just wrote (arXiv 2505.15612)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bcr.learner.rewards import RewardConfig, group_rewards
from bcr.tasks.judging import Judged

CLASSES = ("easy", "medium", "hard")  # at least 2/3 of the group right, at least 1/3, fewer


class MovingTargets:
    """The targets of a run. They begin at `reward.length` and are its state.

    The authors choose on a monitored set every some steps; here it is every step's own rollouts, used from the next step on.
    """

    def __init__(self, config: RewardConfig) -> None:
        assert config.length is not None
        self.config = config
        self.lengths: dict[str, int] = dict.fromkeys(CLASSES, config.length)

    def rewards(self, group: Sequence[Judged]) -> list[list[float]]:
        """`rewards[g][j]`: the rule of `reward.kind`, for each problem at the target of its own class in this group."""
        by_class = {name: group_rewards(group, replace(self.config, length=self.lengths[name])) for name in CLASSES}
        classes = classes_of(group)
        return [[by_class[name][g][j] for j, name in enumerate(classes)] for g in range(len(group))]

    def update(self, groups: Sequence[Sequence[Judged]]) -> None:
        """The smallest target with which one right answer is still to be expected within it, in a group of the class.

        A group of G has at least floor(2G/3), floor(G/3) and 1 right answers in the three classes. Of all answers of the class a share P is
        no longer than the target; P times that number must reach 1. A class of which the step had no problem keeps its target.
        """
        lengths: dict[str, list[int]] = {name: [] for name in CLASSES}
        for group in groups:
            for j, name in enumerate(classes_of(group)):
                lengths[name] += [tokens for judged in group if (tokens := judged.tokens_by_problem[j])]
        size = len(groups[0])
        right = {"easy": max(1, 2 * size // 3), "medium": max(1, size // 3), "hard": 1}
        for name in CLASSES:
            if found := sorted(lengths[name]):
                self.lengths[name] = found[-(-len(found) // right[name]) - 1]

    @property
    def metrics(self) -> dict[str, int]:
        return {f"target_{name}": length for name, length in self.lengths.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"lengths": dict(self.lengths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lengths = dict(state["lengths"])


def classes_of(group: Sequence[Judged]) -> list[str]:
    """The class of each problem of a bundle, by how many of the group's rollouts are right."""
    right = [sum(column) / len(group) for column in zip(*(judged.rewards for judged in group), strict=True)]
    return ["easy" if 3 * share >= 2 else "medium" if 3 * share >= 1 else "hard" for share in right]
