"""Where a step's rollouts come from: bundles, sampled as they are needed or some steps ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bcr.records import Bundle, Problem, Rollout
from bcr.sampler import Sampler, SamplingParams
from bcr.separate_contexts import sample_chains
from bcr.tasks.bundles import Stream, as_request

Batch = tuple[list[Bundle], list[list[Rollout]]]


class RolloutStream:
    """`next()` gives a batch of `per_step` bundles with their rollouts, sampled with the weights as they were `staleness` calls ago.

    With staleness 0 that is: as they are. Otherwise the first call samples so many batches ahead, and each later call one, as a sampler
    would that works beside the learner. Its state: the cursors of the bundles, the policy version, the batches that wait.
    """

    def __init__(self, bundles: Stream, sampler: Sampler, params: SamplingParams, per_step: int, staleness: int = 0) -> None:
        self.bundles, self.sampler, self.params, self.per_step, self.staleness = bundles, sampler, params, per_step, staleness
        self.waiting: deque[Batch] = deque()

    def next(self) -> Batch:
        while len(self.waiting) <= self.staleness:
            self.waiting.append(self.sample(self.per_step))
        return self.waiting.popleft()

    def sample(self, count: int) -> Batch:
        """The next `count` bundles, sampled now."""
        bundles = self.bundles.take(count)
        return bundles, sample_bundles(self.sampler, bundles, self.params)

    def names(self, bundles: Sequence[Bundle], indices: Sequence[int]) -> list[dict[str, Any]]:
        """Bundle and sample of rollouts counted through the whole batch."""
        return [{"bundle": bundles[index // self.params.n].id, "sample": index % self.params.n} for index in indices]

    def state_dict(self) -> dict[str, Any]:
        waiting = [as_plain(batch) for batch in self.waiting]
        return {"bundles": self.bundles.state_dict(), "policy_version": self.sampler.policy_version, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bundles.load_state_dict(state["bundles"])
        self.sampler.policy_version = state["policy_version"]
        self.waiting = deque(as_batch(plain) for plain in state["waiting"])


def sample_bundles(sampler: Sampler, bundles: Sequence[Bundle], params: SamplingParams) -> list[list[Rollout]]:
    """`params.n` rollouts of each bundle: in one context, or in one for each problem where the bundles are made so."""
    if bundles and bundles[0].prompts is not None:
        return sample_chains(sampler, bundles, params)
    return sampler.generate([as_request(bundle) for bundle in bundles], params)


def as_plain(batch: Batch) -> dict[str, Any]:
    """A batch as JSON values; its float32 log-probs come back exactly."""
    bundles, groups = batch
    return {"bundles": [asdict(bundle) for bundle in bundles], "groups": [[asdict(rollout) for rollout in group] for group in groups]}


def as_batch(plain: dict[str, Any]) -> Batch:
    bundles = [Bundle(**{**bundle, "problems": tuple(Problem(**row) for row in bundle["problems"])}) for bundle in plain["bundles"]]
    return bundles, [[Rollout(**row) for row in group] for group in plain["groups"]]
