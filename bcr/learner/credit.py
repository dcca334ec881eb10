"""From judged groups to examples: an advantage for every segment."""

from __future__ import annotations

from collections.abc import Sequence

from bcr.learner.advantages import AdvantageConfig, batch_advantages, group_advantages
from bcr.learner.packs import Example
from bcr.learner.rewards import RewardConfig, group_rewards
from bcr.tasks.judging import Judged


def make_examples(groups: Sequence[Sequence[Judged]], advantage: AdvantageConfig, reward: RewardConfig) -> list[Example]:
    """Rewards, then advantages: one example for each rollout, in order, also for those that turn out to have no signal."""
    rewards = [group_rewards(group, reward) for group in groups]
    advantages = batch_advantages(rewards, [[judged.segments for judged in group] for group in groups], advantage)
    return [
        Example(judged.bundle.prompt_ids, judged.rollout.token_ids, judged.rollout.logprobs, judged.segments, row)
        for group, rows in zip(groups, advantages, strict=True)
        for judged, row in zip(group, rows, strict=True)
    ]


def differs_in_accuracy(group: Sequence[Judged], advantage: AdvantageConfig) -> bool:
    """Whether accuracy alone would teach anything in this group: what DAPO's dynamic sampling asks, whatever the reward."""
    rows = group_advantages([judged.rewards for judged in group], [judged.segments for judged in group], advantage)
    return any(any(row) for row in rows)
