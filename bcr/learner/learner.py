"""What a step learns from its examples: packs, the optimizer step, and what to do when either fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from bcr.learner.logprobs import completion_logprobs
from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.off_policy import OffPolicyConfig, Share, measures, together
from bcr.learner.packs import Example, Pack, make_pack, pack_examples, places, silent_pack
from bcr.learner.probe import fitting_pack
from bcr.learner.reference import Reference
from bcr.learner.step import OptimizerConfig, gradient_norm, optimizer_step, pack_loss
from bcr.model import Decoder
from bcr.parallel.ranks import Ranks
from bcr.parallel.sharding import publish, shard

Result = TypeVar("Result")


@dataclass(frozen=True)
class Learned:
    """Sums for the log; how many of the examples had a signal; and, where an update had to be skipped, which are to blame.

    Of all ranks together, the same on each.
    """

    sums: dict[str, float]
    num_live: int
    skipped: bool
    culprits: list[int]  # indices of the examples whose own loss or gradient is not finite
    extras: dict[str, float]  # measures of the options that are on


class Learner:
    """The optimizer of one run, and with a KL term the frozen reference: the model as it is when the learner is made.

    Alone it trains `model` itself. With several ranks it trains shards of it over `mesh` (`self.model`), and `model` stays the whole copy
    that the sampler reads, brought up to date by `publish`; then every method is a collective. What is out of memory there cannot be tried
    again by one rank alone, so `probe` finds the largest pack beforehand.

    Its plain state is the largest pack that fits in memory, where that was found to be smaller than asked.
    """

    def __init__(
        self,
        model: Decoder,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        off_policy: OffPolicyConfig,
        temperature: float,
        device: torch.device,
        ranks: Ranks | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.ranks = ranks or Ranks.alone(device)
        assert mesh is not None or self.ranks.size == 1, "several ranks train shards"
        self.whole, self.config, self.loss, self.off_policy = model, optimizer, loss, off_policy
        self.temperature, self.device = temperature, device
        self.model = model if mesh is None else shard(model, mesh)
        self.optimizer = optimizer.build(self.model)
        self.reference = Reference(self.model, model, mesh) if loss.kl_coef > 0 else None
        self.pack_tokens = optimizer.pack_tokens
        self._published = False

    def learn(self, examples: Sequence[Example], step: int) -> Learned:
        """The updates of step `step` (from 0) of a process alone; the examples are in the order of their bundles."""
        return self.learn_shares(Share.split(examples, self.off_policy.updates), step)

    def learn_shares(self, shares: Sequence[Share], step: int) -> Learned:
        """The updates of step `step` (from 0), each from its share: as many on every rank, some perhaps without an example."""
        shares = self._with_logprobs(shares)
        lr, updates, culprits, skipped = self.config.rate(step), [], list[int](), False
        for share in shares:
            live = [example for example in share.examples if self.is_live(example)]
            updates.append(self._fitting(live, partial(self._update, total=share.total, lr=lr)))
            if not updates[-1]["updated"] and self.ranks.any(bool(live)):
                skipped = True
                culprits += self._culprits(share)
        sums = together(updates, all_mismatch=self.loss.importance_cap is not None)
        num_live = sum(self.ranks.gather(sum(example.has_signal for share in shares for example in share.examples)))
        return Learned(sums, num_live, skipped, culprits, measures(self.off_policy, self.loss, sums))

    def publish(self) -> None:
        """Bring the sampler's copy of the weights up to date, of frozen ones only the first time.

        Nothing to do for a process alone: there the sampler reads the trainer's.
        """
        if self.model is not self.whole:
            publish(self.model, self.whole, frozen=not self._published)
            self._published = True

    def drop_copy(self) -> None:
        """Free the sampler's copy, where other ranks sample: after `probe`, which needs it, and instead of `publish`."""
        if self.model is not self.whole:
            self.whole.to("meta")

    def probe(self, longest: int, group: int) -> None:
        """Lower `pack_tokens` to what fits into memory on every rank; `longest` is the longest rollout that can come, `group` the most of
        one prompt.

        MemoryError where not even the longest fits.
        """
        readers = group if self.config.share_prompts else 0
        found = fitting_pack(self.whole, self.model, self.loss, self.temperature, self.pack_tokens, longest, readers)
        smallest = min(self.ranks.gather(found))
        if smallest == 0:
            raise MemoryError(no_room(self.device, longest))
        if smallest < self.pack_tokens:
            self.pack_tokens = smallest
            if self.ranks.rank == 0:
                print(f"{self.device} has no room for a larger pack; packs have at most {smallest} tokens.")

    def is_live(self, example: Example) -> bool:
        """Whether it can change the weights."""
        return example.has_signal or (self.reference is not None and len(example.token_ids) > 0)

    def _with_logprobs(self, shares: Sequence[Share]) -> Sequence[Share]:
        """The shares, their live examples with the learner's own log-probs and the reference's, where the loss needs them."""
        live = [example for share in shares for example in share.examples if self.is_live(example)]
        own = self._logprobs(self.model, live) if self.loss.importance_cap is not None else {}
        reference = {}
        if self.reference is not None:
            with self.reference.model() as model:
                reference = self._logprobs(model, live)
        if not own and not reference:
            return shares

        def full(example: Example) -> Example:
            return replace(example, learner_logprobs=own.get(id(example)), reference_logprobs=reference.get(id(example)))

        return [replace(share, examples=[full(example) for example in share.examples]) for share in shares]

    def _logprobs(self, model: Decoder, examples: Sequence[Example]) -> dict[int, list[float]]:
        """Of every example's completion under `model`, by the example's `id`."""

        def work(groups: list[list[Example]]) -> dict[int, list[float]]:
            found = completion_logprobs(model, groups, self.temperature, self.device, self.config.share_prompts)
            return {id(example): row for group, rows in zip(groups, found, strict=True) for example, row in zip(group, rows, strict=True)}

        return self._fitting(examples, work)

    def _fitting(self, examples: Sequence[Example], work: Callable[[list[list[Example]]], Result]) -> Result:
        """`work` on the examples in packs, as many on every rank; out of memory, alone, again with smaller ones.

        It must change no weights before its end.
        """
        while True:
            groups = pack_examples(examples, self.pack_tokens, self.config.share_prompts)
            most = max(self.ranks.gather(len(groups)))
            try:
                return work(groups + [[] for _ in range(most - len(groups))])
            except torch.OutOfMemoryError:
                if self.ranks.size > 1:
                    raise
            self._make_room(groups)  # here, where the error no longer keeps the tensors of the failed pass alive

    def _update(self, groups: Sequence[Sequence[Example]], total: Denominators, lr: float) -> dict[str, float]:
        packs = (self._pack(group, total) for group in groups)
        options = {"temperature": self.temperature, "lr": lr, "grad_clip": self.config.grad_clip}
        return optimizer_step(self.model, self.optimizer, packs, self.loss.rule(), **options, ranks=self.ranks)

    def _pack(self, group: Sequence[Example], total: Denominators) -> Pack:
        if not group:
            return silent_pack(self.loss, self.device)
        return make_pack(group, self.loss, total, self.device, share_prompts=self.config.share_prompts)

    def _make_room(self, groups: Sequence[Sequence[Example]]) -> None:
        """Drop the gradients of the failed attempt and halve the packs, for good: the next step would fail just so."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        sizes = [(len(group) > 1, places(group, self.config.share_prompts)) for group in groups]
        several, largest = max(sizes)  # a single rollout may have more places, but one of several may hold more keys and values
        if not several:
            raise MemoryError(no_room(self.device, largest))
        self.pack_tokens = largest // 2
        print(f"{self.device} is out of memory with a pack of {largest} tokens; packs have at most {self.pack_tokens} from now on.")

    def _culprits(self, share: Share) -> list[int]:
        """The examples of all ranks that alone already have a loss or a gradient that is not finite, by their indices.

        It takes as long as a step with packs of one. Where the ranks' examples of one round are not sound together, each is tried alone.
        """
        found = []
        for index, example in self._rounds(share):
            if self._is_sound(example, share.total):
                continue
            for rank in range(self.ranks.size):
                tried = example if rank == self.ranks.rank else None
                if (self.ranks.size == 1 or not self._is_sound(tried, share.total)) and tried is not None:
                    found.append(index)
        return sorted(index for part in self.ranks.gather(found) for index in part)

    def _rounds(self, share: Share) -> list[tuple[int, Example | None]]:
        """The live examples with their indices, filled up with None to the number of the rank that has most."""
        live = [(index, example) for index, example in zip(share.indices, share.examples, strict=True) if self.is_live(example)]
        most = max(self.ranks.gather(len(live)))
        return live + [(-1, None)] * (most - len(live))

    def _is_sound(self, example: Example | None, total: Denominators) -> bool:
        """Whether loss and gradient of the ranks' examples (None: this rank has none) together are finite. Nothing is learnt from them."""
        loss, _ = pack_loss(self.model, self._pack([] if example is None else [example], total), self.loss.rule(), self.temperature)
        loss.backward()
        norm = gradient_norm(self.model.parameters())
        self.model.zero_grad(set_to_none=True)
        return not self.ranks.any(not bool(torch.isfinite(loss) & torch.isfinite(norm)))

    def state_dict(self) -> dict[str, Any]:
        return {"pack_tokens": self.pack_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pack_tokens = state["pack_tokens"]


def no_room(device: torch.device, tokens: int) -> str:
    return f"{device} has no room for one rollout of {tokens} tokens; lower bundles.budget, or sampling.cache_mb for more room."
