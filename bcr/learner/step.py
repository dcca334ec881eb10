"""One optimizer step: packs in, weights changed in place, sums for the log out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bcr.learner.forward import hidden_states
from bcr.learner.losses import SequenceRule
from bcr.learner.masters import MasterAdamW
from bcr.learner.packs import Pack
from bcr.learner.sequence_loss import sequence_policy_loss
from bcr.model import Decoder
from bcr_kernels import LossRule, add_metrics, linear_logprob, linear_policy_loss


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up to a constant rate. `pack_tokens` bounds one forward pass."""

    lr: float = 1e-6
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.0
    warmup_steps: int = 0
    grad_clip: float = 1.0
    pack_tokens: int = 16384

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
    hidden = hidden_states(model, pack)
    if isinstance(rule, SequenceRule):
        logprobs = linear_logprob(hidden, model.head_weight, pack.targets, temperature=temperature).logprob
        return sequence_policy_loss(logprobs, pack, rule)
    output = linear_policy_loss(
        hidden,
        model.head_weight,
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


def optimizer_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    packs: Iterable[Pack],
    rule: LossRule,
    *,
    temperature: float,
    lr: float,
    grad_clip: float,
) -> dict[str, float]:
    """Accumulate the gradient over the packs in float32, clip it, update.

    Without a pack, or with a loss or gradient that is not finite, nothing changes.
    """
    sums: dict[str, Tensor] = {}
    empty = True
    masters = optimizer if isinstance(optimizer, MasterAdamW) else None
    with masters.collecting() if masters else contextlib.nullcontext():
        for pack in packs:
            head_gradient = masters.accumulator(model.head_weight) if masters else None
            loss, metrics = pack_loss(model, pack, rule, temperature, head_gradient)
            loss.backward()
            empty = False
            sums = add_metrics(sums, metrics)
    if empty:
        return {"grad_norm": 0.0, "updated": 0.0}
    grad_norm = torch.nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], grad_clip)
    updated = bool(torch.isfinite(grad_norm) & torch.isfinite(sums["loss_sum"]))
    if updated:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**{name: float(value) for name, value in sums.items()}, "grad_norm": float(grad_norm), "updated": float(updated)}
