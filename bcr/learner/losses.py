"""Loss settings, and how much each token counts under global denominators (contract 5).

The rule for one token lives in `bcr_kernels.policy_loss`, the arithmetic of the weights in `bcr_kernels.segments`; here is the choice
between them, named as in verl.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bcr.records import Segment
from bcr_kernels import (
    LossRule,
    problem_mean_weights,
    sequence_mean_token_mean_weights,
    sequence_mean_token_sum_weights,
    token_mean_weights,
)

KINDS = ("clip", "cispo", "gspo")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm", "problem-mean")


@dataclass(frozen=True)
class SequenceRule(LossRule):
    """A LossRule of kind "clip" whose ratio is that of the whole rollout: see `sequence_loss`."""


@dataclass
class LossConfig:
    """`kind` "clip" with equal clips is GRPO; with clip_high above clip_low DAPO's clip-higher; with seq-mean-token-sum-norm and
    `advantage.normalise_std: false` Dr.GRPO; "cispo" clips the weight instead of the gradient; "gspo" clips the ratio of a whole rollout.
    `horizon` is Dr.GRPO's fixed length.

    `importance_cap` C: tokens are weighed by min(p_learner / p_sampler, C) of the weights before the update, for a sampler whose numbers
    differ or that lags behind. `kl_coef`: of the KL divergence from the model that the run started from.
    """

    kind: str = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: str = "token-mean"
    horizon: int | None = None
    importance_cap: float | None = None
    kl_coef: float = 0.0

    def check(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"loss.kind is {self.kind!r}; it must be one of {', '.join(KINDS)}.")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"loss.aggregation is {self.aggregation!r}; it must be one of {', '.join(AGGREGATIONS)}.")
        if (self.aggregation == "seq-mean-token-sum-norm") != (self.horizon is not None):
            raise ValueError("loss.horizon is the fixed length of loss.aggregation=seq-mean-token-sum-norm: give it there and only there.")
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"loss.horizon is {self.horizon}; it must be at least 1.")
        try:
            self.rule()
        except ValueError as error:
            raise ValueError(f"loss.{error}.") from error

    def rule(self) -> LossRule:
        kind, rule = ("clip", SequenceRule) if self.kind == "gspo" else (self.kind, LossRule)
        return rule(kind, self.clip_low, self.clip_high, self.importance_cap, self.kl_coef)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Denominators:
    """Counts over everything sampled for one optimizer step, on all ranks, also what is dropped later for want of signal."""

    tokens: int
    rollouts: int
    problems: int  # (rollout, problem) pairs that have tokens

    @staticmethod
    def of(rollouts: Iterable[Sequence[Segment]]) -> Denominators:
        spans = list(rollouts)
        return Denominators(
            tokens=sum(segment.stop - segment.start for row in spans for segment in row),
            rollouts=sum(bool(row) for row in spans),
            problems=sum(len({segment.problem for segment in row}) for row in spans),
        )

    @staticmethod
    def total(parts: Iterable[Denominators]) -> Denominators:
        """The counts of all ranks together."""
        counts = [(part.tokens, part.rollouts, part.problems) for part in parts]
        return Denominators(*(sum(column) for column in zip(*counts, strict=True)))


def token_weights(
    config: LossConfig, total: Denominators, segment_ids: Tensor, sequence_ids: Tensor, problem_ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """weights[T]: what each token counts in the loss, which is the weighted sum over tokens; 0 where `segment_ids` is -1.

    token-mean: 1 / tokens. seq-mean-token-mean: 1 / (rollouts * tokens of this rollout). seq-mean-token-sum-norm: 1 / (rollouts * horizon).
    problem-mean: 1 / (problems * tokens of this problem in this rollout), so that every problem counts the same however long its answer.
    Ids are int64 [T]: `sequence_ids` of rollouts, `problem_ids` of (rollout, problem) pairs, both from 0 within the pack.
    """
    match config.aggregation:
        case "token-mean":
            return token_mean_weights(segment_ids, total.tokens, dtype)
        case "seq-mean-token-mean":
            return sequence_mean_token_mean_weights(segment_ids, sequence_ids, count(sequence_ids), total.rollouts, dtype)
        case "seq-mean-token-sum-norm":
            assert config.horizon is not None
            return sequence_mean_token_sum_weights(segment_ids, total.rollouts, config.horizon, dtype)
        case _:
            return problem_mean_weights(problem_ids, count(problem_ids), total.problems, dtype)


def count(ids: Tensor) -> int:
    return int(ids.max()) + 1 if ids.numel() else 0
