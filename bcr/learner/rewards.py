"""Rewards: what each problem of a rollout is worth. BCR's is accuracy alone; the others are its rivals, which reward length explicitly.

A rule sees the whole group of a bundle and gives `rewards[g][j]`, one number for each problem j of each rollout g; `bcr.learner.advantages`
does the rest. Through `Judged` it knows the verdicts, the tokens of every segment, the budget and the other rollouts of the group, which
is all that the published length rewards are made of. A new one is a function, its settings and a line in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bcr.learner import length_rewards as lengths
from bcr.tasks.judging import Judged


@dataclass
class RewardConfig:
    """`kind` names the rule. The numbers belong to the rules that use them and must be null elsewhere; `length` and `buffer` in tokens.

    `moving`: `length` is where the targets of laser or laser_d begin, one for each class of difficulty; see `bcr.learner.targets`.
    """

    kind: str = "accuracy"
    coefficient: float | None = None
    length: int | None = None
    buffer: int | None = None
    moving: bool = False

    def check(self) -> None:
        if self.kind not in RULES:
            raise ValueError(f"reward.kind is {self.kind!r}; it must be one of {', '.join(RULES)}.")
        _, used = RULES[self.kind]
        for name in ("coefficient", "length", "buffer"):
            value = getattr(self, name)
            if name in used and value is None:
                raise ValueError(f"reward.{name} is null; reward.kind={self.kind} needs a positive number.")
            if name not in used and value is not None:
                raise ValueError(f"reward.{name} is {value}; reward.kind={self.kind} has no use for it: leave it null.")
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"reward.{name} is {value}; it must be a positive number.")
        if self.moving and self.kind not in ("laser", "laser_d"):
            raise ValueError(f"reward.moving is true, but reward.kind={self.kind} has no targets to move; it is for laser and laser_d.")
        if self.buffer is not None and self.length is not None and self.buffer > self.length:
            raise ValueError(f"reward.buffer is {self.buffer}; it must be at most reward.length, {self.length}.")


def group_rewards(group: Sequence[Judged], config: RewardConfig) -> list[list[float]]:
    """`rewards[g][j]` of problem j in rollout g, for the G rollouts of one bundle."""
    rule, _ = RULES[config.kind]
    return rule(group, config)


def accuracy(group: Sequence[Judged], config: RewardConfig) -> list[list[float]]:
    """correct: 1 for a correct answer, 0 for everything else."""
    return [judged.rewards for judged in group]


def linear_penalty(group: Sequence[Judged], config: RewardConfig) -> list[list[float]]:
    """correct - coefficient * tokens / length, where `tokens` are those of the problem's own segments, right or wrong.

    The explicit length penalty that the BCR paper (arXiv 2604.02322, its ablation) reports to collapse: past some coefficient a wrong
    answer in a few tokens is worth more than a correct one that was reasoned out. A problem that was never opened costs nothing.
    With `advantage.scope: rollout` the reward of a rollout is its accuracy less coefficient * (all its tokens) / (N * length).
    """
    assert config.coefficient is not None
    assert config.length is not None
    price = config.coefficient / config.length
    return [
        [correct - price * tokens for correct, tokens in zip(judged.rewards, judged.tokens_by_problem, strict=True)] for judged in group
    ]


Rule = Callable[[Sequence[Judged], RewardConfig], list[list[float]]]
RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {  # kind -> its rule and the settings it uses
    "accuracy": (accuracy, ()),
    "linear_penalty": (linear_penalty, ("coefficient", "length")),
    "truncation": (lengths.truncation, ("length",)),
    "kimi": (lengths.kimi, ("coefficient",)),
    "l1_max": (lengths.l1_max, ("coefficient", "length")),
    "laser": (lengths.laser, ("coefficient", "length")),
    "laser_d": (lengths.laser_d, ("coefficient", "length")),
    "arora_zanette": (lengths.arora_zanette, ("coefficient",)),
    "shorter_better": (lengths.shorter_better, ("coefficient",)),
    "overlong": (lengths.overlong, ("length", "buffer")),
}
