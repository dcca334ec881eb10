"""What a step learns from its examples: packs, the optimizer step, and what to do when either fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from bcr.learner.logprobs import completion_logprobs
from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.off_policy import OffPolicyConfig, measures, together
from bcr.learner.packs import Example, make_pack, pack_examples
from bcr.learner.step import OptimizerConfig, optimizer_step, pack_loss
from bcr.model import Decoder

Result = TypeVar("Result")


@dataclass(frozen=True)
class Learned:
    """Sums for the log; how many of the examples had a signal; and, where an update had to be skipped, which are to blame."""

    sums: dict[str, float]
    num_live: int
    skipped: bool
    culprits: list[int]  # indices of the examples whose own loss or gradient is not finite
    extras: dict[str, float]  # measures of the options that are on


class Learner:
    """The optimizer of one run, and with a KL term the frozen reference: the model as it is when the learner is made.

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
    ) -> None:
        self.model, self.config, self.loss, self.off_policy = model, optimizer, loss, off_policy
        self.temperature, self.device = temperature, device
        self.optimizer = optimizer.build(model)
        frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}  # shared, not copied
        self.reference = copy.deepcopy(model, frozen).requires_grad_(False) if loss.kl_coef > 0 else None
        self.pack_tokens = optimizer.pack_tokens

    def learn(self, examples: Sequence[Example], step: int) -> Learned:
        """The updates of step `step` (from 0), each from its share of the examples, which are in the order of their bundles."""
        examples = self._with_logprobs(examples)
        size = len(examples) // self.off_policy.updates
        lr, updates, culprits, skipped = self.config.rate(step), [], list[int](), False
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            total = Denominators.of(example.segments for example in part)
            live = [example for example in part if self._is_live(example)]
            updates.append(self._fitting(live, partial(self._update, total=total, lr=lr)))
            if live and not updates[-1]["updated"]:
                skipped = True
                culprits += [start + index for index in self._culprits(part, total)]
        sums = together(updates, all_mismatch=self.loss.importance_cap is not None)
        num_live = sum(example.has_signal for example in examples)
        return Learned(sums, num_live, skipped, culprits, measures(self.off_policy, self.loss, sums))

    def _is_live(self, example: Example) -> bool:
        return example.has_signal or (self.reference is not None and len(example.token_ids) > 0)

    def _with_logprobs(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The live examples with the learner's own log-probs and the reference's, where the loss needs them."""
        live = [example for example in examples if self._is_live(example)]
        own = self._logprobs(self.model, live) if self.loss.importance_cap is not None else {}
        reference = self._logprobs(self.reference, live) if self.reference is not None else {}
        if not own and not reference:
            return examples
        return [
            replace(example, learner_logprobs=own.get(id(example)), reference_logprobs=reference.get(id(example))) for example in examples
        ]

    def _logprobs(self, model: Decoder, examples: Sequence[Example]) -> dict[int, list[float]]:
        """Of every example's completion under `model`, by the example's `id`."""

        def work(groups: list[list[Example]]) -> dict[int, list[float]]:
            found = completion_logprobs(model, groups, self.temperature, self.device)
            return {id(example): row for group, rows in zip(groups, found, strict=True) for example, row in zip(group, rows, strict=True)}

        return self._fitting(examples, work)

    def _fitting(self, examples: Sequence[Example], work: Callable[[list[list[Example]]], Result]) -> Result:
        """`work` on the examples in packs; out of memory, again with smaller ones. It must change no weights before its end."""
        while True:
            groups = pack_examples(examples, self.pack_tokens)
            try:
                return work(groups)
            except torch.OutOfMemoryError:
                pass  # go on below, where the error no longer keeps the tensors of the failed pass alive
            self._make_room(groups)

    def _update(self, groups: Sequence[Sequence[Example]], total: Denominators, lr: float) -> dict[str, float]:
        packs = (make_pack(group, self.loss, total, self.device) for group in groups)
        options = {"temperature": self.temperature, "lr": lr, "grad_clip": self.config.grad_clip}
        return optimizer_step(self.model, self.optimizer, packs, self.loss.rule(), **options)

    def _make_room(self, groups: Sequence[Sequence[Example]]) -> None:
        """Drop the gradients of the failed attempt and halve the packs, for good: the next step would fail just so."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        largest, count = max((sum(example.length for example in group), len(group)) for group in groups)
        if count == 1:
            raise MemoryError(
                f"{self.device} has no room for one rollout of {largest} tokens; lower bundles.budget, or sampling.cache_mb for more room."
            )
        self.pack_tokens = largest // 2
        print(f"{self.device} is out of memory for a pack of {largest} tokens; packs have at most {self.pack_tokens} from now on.")

    def _culprits(self, examples: Sequence[Example], total: Denominators) -> list[int]:
        """The examples that alone already have a loss or a gradient that is not finite. It takes as long as a step with packs of one."""
        found = []
        for index, example in enumerate(examples):
            if not self._is_live(example):
                continue
            pack = make_pack([example], self.loss, total, self.device)
            loss, _ = pack_loss(self.model, pack, self.loss.rule(), self.temperature)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([weight.grad for weight in self.model.parameters() if weight.grad is not None])
            if not (torch.isfinite(loss) and torch.isfinite(norm)):
                found.append(index)
            self.model.zero_grad(set_to_none=True)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"pack_tokens": self.pack_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.pack_tokens = state["pack_tokens"]
