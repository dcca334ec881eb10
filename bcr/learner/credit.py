"""From judged groups to examples: an advantage for every segment."""

from __future__ import annotations

from collections.abc import Sequence

from bcr.learner.advantages import AdvantageConfig, batch_advantages, group_advantages
from bcr.learner.packs import Example
from bcr.learner.rewards import RewardConfig, group_rewards
from bcr.learner.targets import MovingTargets
from bcr.tasks.judging import Judged


def make_examples(
    groups: Sequence[Sequence[Judged]], advantage: AdvantageConfig, reward: RewardConfig, targets: MovingTargets | None = None
) -> list[Example]:
    """Rewards, then advantages: one example for each rollout, in order, also for those that turn out to have no signal."""
    rewards = [targets.rewards(group) if targets else group_rewards(group, reward) for group in groups]
    advantages = batch_advantages(rewards, [[judged.segments for judged in group] for group in groups], advantage)
    return [
        make_example(judged, row) for group, rows in zip(groups, advantages, strict=True) for judged, row in zip(group, rows, strict=True)
    ]


def make_example(judged: Judged, advantages: Sequence[float]) -> Example:
    bundle, rollout = judged.bundle, judged.rollout
    contexts = None
    if rollout.contexts is not None:
        assert bundle.prompts is not None
        contexts = [(prompt, length) for prompt, length in zip(bundle.prompts, rollout.contexts, strict=True) if length]
    return Example(bundle.prompt_ids, rollout.token_ids, rollout.logprobs, judged.segments, advantages, contexts=contexts)


def differs_in_accuracy(group: Sequence[Judged], advantage: AdvantageConfig) -> bool:
    """Whether accuracy alone would teach anything in this group: what DAPO's dynamic sampling asks, whatever the reward."""
    rows = group_advantages([judged.rewards for judged in group], [judged.segments for judged in group], advantage)
    return any(any(row) for row in rows)
