"""Where a step's rollouts come from: bundles, dealt to the ranks, sampled as they are needed or some steps ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bcr.parallel.exchange import balanced
from bcr.parallel.ranks import Ranks
from bcr.records import Bundle, Problem, Rollout
from bcr.sampler import Sampler, SamplingParams
from bcr.separate_contexts import sample_chains
from bcr.tasks.bundles import Stream, as_request
from bcr.tasks.judging import Judged


@dataclass
class Batch:
    """Bundles of a step with their rollouts: those of one rank, at their `places` among all of the step."""

    places: list[int]
    bundles: list[Bundle]
    groups: list[list[Rollout]]
    judged: list[list[Judged]] | None = None  # where that has been done ahead


class RolloutStream:
    """`next()` gives this rank's part of a batch of `per_step` bundles, sampled with the weights as they were `staleness` calls ago.

    With staleness 0 that is: as they are. Otherwise the first call samples so many batches ahead, and each later call one, as a sampler
    would that works beside the learner. With `samplers` it does: only the last so many ranks sample, in `ahead`, while the others learn
    from what the last call gave; the first call alone finds nothing there. Every rank takes the same bundles from the stream and samples
    some of them; as sampling is keyed by bundle and sample, all ranks together have the same rollouts however many they are.

    Its state, whole on the first rank: the cursors of the bundles, the policy version, the batches that wait.
    """

    def __init__(
        self,
        bundles: Stream,
        sampler: Sampler,
        params: SamplingParams,
        per_step: int,
        staleness: int = 0,
        ranks: Ranks | None = None,
        samplers: int = 0,
    ) -> None:
        self.bundles, self.sampler, self.params, self.per_step, self.staleness = bundles, sampler, params, per_step, staleness
        self.ranks, self.samplers = ranks or Ranks.alone(), samplers
        self.waiting: deque[Batch] = deque()

    def next(self) -> Batch:
        self._fill(1 if self.samplers else self.staleness + 1)
        return self.waiting.popleft()

    def ahead(self) -> list[Batch]:
        """Sample what is to wait, with the weights as they are: nothing is left to do, unless `samplers` work beside the learner."""
        return self._fill(self.staleness)

    def _fill(self, count: int) -> list[Batch]:
        """Sample until so many batches wait; the new ones."""
        new = [self.sample(self.per_step) for _ in range(count - len(self.waiting))]
        self.waiting.extend(new)
        return new

    def sample(self, count: int) -> Batch:
        """This rank's part of the next `count` bundles, sampled now."""
        bundles = self.bundles.take(count)
        places = self._own(bundles)
        own = [bundles[place] for place in places]
        return Batch(places, own, sample_bundles(self.sampler, own, self.params))

    def names(self, bundles: Sequence[Bundle], indices: Sequence[int]) -> list[dict[str, Any]]:
        """Bundle and sample of rollouts counted through the whole batch."""
        return [{"bundle": bundles[index // self.params.n].id, "sample": index % self.params.n} for index in indices]

    def _own(self, bundles: Sequence[Bundle]) -> list[int]:
        """The places of this rank's bundles: the ranks' sums of budgets are nearly equal."""
        sampling = self.samplers or self.ranks.size
        rank_of = balanced([bundle.budget for bundle in bundles], sampling)
        return [place for place, rank in enumerate(rank_of) if rank == self.ranks.rank - (self.ranks.size - sampling)]

    def state_dict(self) -> dict[str, Any]:
        sampled = [replace(batch, judged=None) for batch in self.waiting]  # judging gives the same again
        waiting = [as_plain(parts) for parts in zip(*self.ranks.gather_first(sampled), strict=True)]
        return {"bundles": self.bundles.state_dict(), "policy_version": self.sampler.policy_version, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bundles.load_state_dict(state["bundles"])
        self.sampler.policy_version = state["policy_version"]
        self.waiting = deque(map(self._from_plain, state["waiting"]))

    def _from_plain(self, plain: dict[str, Any]) -> Batch:
        """This rank's part of a whole batch."""
        bundles = [Bundle(**{**bundle, "problems": tuple(Problem(**row) for row in bundle["problems"])}) for bundle in plain["bundles"]]
        places = self._own(bundles)
        groups = [[Rollout(**row) for row in plain["groups"][place]] for place in places]
        return Batch(places, [bundles[place] for place in places], groups)


def sample_bundles(sampler: Sampler, bundles: Sequence[Bundle], params: SamplingParams) -> list[list[Rollout]]:
    """`params.n` rollouts of each bundle: in one context, or in one for each problem where the bundles are made so."""
    if bundles and bundles[0].prompts is not None:
        return sample_chains(sampler, bundles, params)
    return sampler.generate([as_request(bundle) for bundle in bundles], params)


def as_plain(parts: Sequence[Batch]) -> dict[str, Any]:
    """All ranks' parts of a batch as JSON values; its float32 log-probs come back exactly."""
    rows = sorted((row for part in parts for row in zip(part.places, part.bundles, part.groups, strict=True)), key=lambda row: row[0])
    return {
        "bundles": [asdict(bundle) for _, bundle, _ in rows],
        "groups": [[asdict(rollout) for rollout in group] for _, _, group in rows],
    }
