"""Learning from rollouts of older weights: several updates for each sampling, rollouts that wait, and what the log says of either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.packs import Example

MEANS = ("loss_sum", "grad_norm", "updated")


@dataclass
class OffPolicyConfig:
    """`updates`: optimizer steps for each sampling, its bundles split among them. `staleness`: steps that rollouts wait to be learnt."""

    updates: int = 1
    staleness: int = 0

    def check(self, bundles_per_step: int) -> None:
        if self.updates < 1 or bundles_per_step % self.updates:
            raise ValueError(f"off_policy.updates is {self.updates}; it must divide bundles.per_step, which is {bundles_per_step}.")
        if self.staleness < 0:
            raise ValueError(f"off_policy.staleness is {self.staleness}; it must not be negative.")


@dataclass(frozen=True)
class Share:
    """What one rank learns from in one update. `indices`: of each example its place among all that the ranks sampled for the step."""

    examples: Sequence[Example]
    indices: Sequence[int]
    total: Denominators  # of the update, over all ranks

    @staticmethod
    def split(examples: Sequence[Example], updates: int) -> list[Share]:
        """The shares of one process alone: the step's examples, in the order of their bundles, split among the updates."""
        size = len(examples) // updates
        starts = range(0, len(examples), size)
        parts = [(examples[start : start + size], range(start, start + size)) for start in starts]
        return [Share(part, indices, Denominators.of(example.segments for example in part)) for part, indices in parts]


def together(updates: Sequence[dict[str, float]], all_mismatch: bool) -> dict[str, float]:
    """The sums of a step's updates as one: means of loss, gradient norm and `updated`, else sums and maxima.

    Sampler against learner (`...mismatch...`, and `mismatch_tokens` that it was counted over) is of the first update with tokens alone, for
    later ones have moved away on purpose; of all where `all_mismatch`, when each compares the weights before the first.

    >>> first, second = {"tokens": 2.0, "loss_sum": 1.0, "max_mismatch_abs": 0.1}, {"tokens": 3.0, "loss_sum": 3.0, "max_mismatch_abs": 0.5}
    >>> together([first, second], all_mismatch=False)
    {'tokens': 5.0, 'loss_sum': 2.0, 'max_mismatch_abs': 0.1, 'mismatch_tokens': 2.0}
    """
    with_tokens = [update for update in updates if update.get("tokens")]
    counted = with_tokens if all_mismatch else with_tokens[:1]
    total: dict[str, float] = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [update[name] for update in (counted if "mismatch" in name else updates) if name in update] or [0.0]
        total[name] = max(values) if name.startswith("max_") else sum(values) / (len(updates) if name in MEANS else 1)
    return {**total, "mismatch_tokens": float(sum(update["tokens"] for update in counted))}


def measures(off_policy: OffPolicyConfig, loss: LossConfig, sums: dict[str, float]) -> dict[str, float]:
    """What the options that are on add to the log: nothing for the synchronous on-policy default."""
    tokens = max(1.0, sums.get("tokens", 0.0))
    wanted: dict[str, str] = {}
    if off_policy.updates > 1 or off_policy.staleness > 0:
        wanted["policy_kl"] = "policy_kl_sum"  # how far the policy has moved from the weights that the ratio compares with
    if loss.importance_cap is not None:
        wanted |= {"importance_mean": "importance_sum", "importance_capped": "importance_capped"}
    if loss.kl_coef > 0:
        wanted["reference_kl"] = "reference_kl_sum"
    return {name: sums.get(key, 0.0) / tokens for name, key in wanted.items()}
