"""Sampling beside learning, on ranks of its own: the last `samplers` of a run's ranks only sample and judge, the others only learn.

                 step t                                                     then all meet
    learners     learn from batch t                                         weights t to the samplers,
    samplers     sample and judge batch t+1 with weights t-1                batch t+1 to everybody

So each batch but the first was sampled with the weights of one update before: rollout by rollout what `off_policy.staleness=1` gives where
ranks do both in turn. (prime-rl and verl call this one-step off-policy.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from bcr.learner.learner import Learned, Learner
from bcr.model import Decoder
from bcr.parallel.ranks import Ranks
from bcr.parallel.sharding import streamed
from bcr.runtime.clock import Clock


class Handover:
    """Who learns and who samples, and how they meet once a step. Without `samplers` every rank does both, and nothing is handed over.

    `learners`: the ranks that learn, for their own collectives. Every method is a collective of all ranks, and so is making one.
    """

    def __init__(self, ranks: Ranks, samplers: int = 0) -> None:
        """ValueError where there are not as many ranks, and one more to learn."""
        if samplers < 0:
            raise ValueError(f"parallel.samplers is {samplers}; it must not be negative.")
        if samplers and ranks.size == 1:
            raise ValueError(f"parallel.samplers is {samplers} and this is one process alone; start more with torchrun, or set it to 0.")
        if samplers >= ranks.size:
            raise ValueError(f"parallel.samplers is {samplers} of {ranks.size} ranks; it must leave one at least to learn.")
        self.ranks, self.samplers = ranks, samplers
        self.learners = ranks.first_ones(ranks.size - samplers)
        self.learns = ranks.rank < self.learners.size
        self._way = ranks.subgroup([0, *range(self.learners.size, ranks.size)]) if samplers else None  # of the weights
        self._published = False

    def meet(self, learned: Learned | None, clock: Clock) -> Learned:
        """What was learnt, on every rank, once all are done with the step. The clock gets how long this rank waited for the other side."""
        if self.samplers:
            with clock("waiting_for_samplers" if self.learns else "waiting_for_learners"):
                learned = self.ranks.gather(learned)[0]
        assert learned is not None
        return learned

    @torch.no_grad()
    def publish(self, learner: Learner | None, copy: Decoder) -> None:
        """Bring the weights into the `copy` that is sampled from, in place, frozen ones only the first time; the samplers have no learner.

        The learners gather one layer after the other, and the first of them sends it on: nobody holds more than that beside his own.
        """
        if learner is not None and not self.samplers:
            learner.publish()
            return
        for weight in streamed(copy if learner is None else learner.model, frozen=not self._published):
            if self.ranks.first or learner is None:
                flat = weight.contiguous()  # or gloo sends what lies behind its first number
                dist.broadcast(flat, 0, self._way)
                if learner is None and flat is not weight:
                    weight.copy_(flat)
        self._published = True
