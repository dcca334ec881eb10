"""From judged groups to examples: an advantage for every segment."""

from __future__ import annotations

from collections.abc import Sequence

from bcr.learner.advantages import AdvantageConfig, group_advantages
from bcr.learner.packs import Example
from bcr.learner.rewards import RewardConfig, group_rewards
from bcr.tasks.judging import Judged


def make_examples(groups: Sequence[Sequence[Judged]], advantage: AdvantageConfig, reward: RewardConfig) -> list[Example]:
    """Rewards, then advantages: one example for each rollout, in order, also for those that turn out to have no signal."""
    examples = []
    for group in groups:
        advantages = group_advantages(group_rewards(group, reward), [judged.segments for judged in group], advantage)
        for judged, row in zip(group, advantages, strict=True):
            rollout = judged.rollout
            examples.append(Example(judged.bundle.prompt_ids, rollout.token_ids, rollout.logprobs, judged.segments, row))
    return examples
