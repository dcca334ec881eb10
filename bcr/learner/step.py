"""One optimizer step: packs in, weights changed in place, sums for the log out."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from bcr.learner.forward import through_head
from bcr.learner.losses import SequenceRule
from bcr.learner.masters import MasterAdamW
from bcr.learner.packs import Pack
from bcr.learner.sequence_loss import sequence_policy_loss
from bcr.model import Decoder
from bcr.parallel.ranks import Ranks
from bcr.parallel.sharding import reduce_between_replicas, whole
from bcr_kernels import LossRule, add_metrics, linear_logprob, linear_policy_loss

Item = TypeVar("Item")


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up to a constant rate. `pack_tokens` bounds one forward pass, in which with `share_prompts` the rollouts of a
    prompt have it once between them."""

    lr: float = 1e-6
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    warmup_steps: int = 0
    grad_clip: float = 1.0
    pack_tokens: int = 16384
    share_prompts: bool = True

    def check(self) -> None:
        for name in ("lr", "grad_clip", "pack_tokens"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be positive.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}; it must be two numbers from 0 up to, but not including, 1.")

    def build(self, model: Decoder) -> MasterAdamW:
        """AdamW over the weights that require a gradient, with float32 state whatever their dtype."""
        beta1, beta2 = self.betas
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        return MasterAdamW(trained, lr=self.lr, betas=(beta1, beta2), weight_decay=self.weight_decay, fused=True)

    def rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))


def pack_loss(
    model: Decoder, pack: Pack, rule: LossRule, temperature: float, head_gradient: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The pack's share of the step's loss, and sums for the log. No [T,V] tensor of the whole pack is ever made.

    `head_gradient`: float32 [V,H], to which the backward adds the gradient of a narrow head's weight instead of rounding it.
    """

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(rule, SequenceRule):
            logprobs = linear_logprob(hidden, weight, pack.targets, temperature=temperature).logprob
            return sequence_policy_loss(logprobs, pack, rule)
        output = linear_policy_loss(
            hidden,
            weight,
            pack.targets,
            old_logprobs=pack.old_logprobs,
            segment_ids=pack.segment_ids,
            advantages=pack.advantages,
            weights=pack.weights,
            rule=rule,
            temperature=temperature,
            behaviour_logprobs=pack.behaviour_logprobs,
            reference_logprobs=pack.reference_logprobs,
            weight_grad_accumulator=head_gradient,
        )
        return output.loss, output.metrics

    loss, metrics = through_head(model, pack, head)
    return loss, metrics


def optimizer_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    packs: Iterable[Pack],
    rule: LossRule,
    *,
    temperature: float,
    lr: float,
    grad_clip: float,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Accumulate the gradient over the packs in float32, clip it, update.

    Without a pack, or with a loss or gradient that is not finite, nothing changes. With several ranks every one calls it, with the same
    number of packs, and all get the same sums and decide alike.
    """
    sums: dict[str, Tensor] = {}
    empty = True
    masters = optimizer if isinstance(optimizer, MasterAdamW) else None
    with masters.collecting() if masters else contextlib.nullcontext():
        for pack, last in until_last(packs):
            head_gradient = masters.accumulator(model.head_weight) if masters else None
            reduce_between_replicas(model, last)
            loss, metrics = pack_loss(model, pack, rule, temperature, head_gradient)
            loss.backward()
            empty = False
            sums = add_metrics(sums, metrics)
    if empty:
        return {"grad_norm": 0.0, "updated": 0.0}
    total = over_ranks({name: float(value) for name, value in sums.items()}, ranks)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    grad_norm = gradient_norm(weights)
    torch.nn.utils.clip_grads_with_norm_(weights, grad_clip, grad_norm)
    updated = math.isfinite(grad_norm) and math.isfinite(total["loss_sum"])
    if updated:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**total, "grad_norm": float(grad_norm), "updated": float(updated)}


def until_last(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Each item, and whether it is the last.

    >>> list(until_last("ab"))
    [('a', False), ('b', True)]
    """
    end = object()
    for item, after in itertools.pairwise(itertools.chain(items, [end])):
        yield item, after is end  # type: ignore[misc]


def gradient_norm(weights: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, 0-d; of sharded ones over all shards, the same on every rank."""
    return whole(torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None]))


def over_ranks(sums: dict[str, float], ranks: Ranks | None) -> dict[str, float]:
    """The metrics of all ranks: maxima of what is called `max_...`, sums of the rest."""
    if ranks is None or ranks.size == 1:
        return sums
    maxima = {name: value for name, value in sums.items() if name.startswith("max_")}
    return {**ranks.sum({name: value for name, value in sums.items() if name not in maxima}), **ranks.max(maxima)}
