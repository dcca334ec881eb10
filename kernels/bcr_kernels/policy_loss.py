"""The policy loss as a rule on vectors [T]: what a token's log-prob, advantage and weight cost. No logits in sight.

GRPO, Dr.GRPO and DAPO are one rule, "clip" (PPO's, arXiv 1707.06347, eq. 7): they differ in the per-token weights (`segments`) and
in `clip_high` (DAPO, arXiv 2503.14476, section 3.1, takes 0.28 above and 0.2 below). CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4)
is the other: a truncated importance weight, held constant, times the log-prob, so that no token loses its gradient.

With r = exp(logprob - old_logprob), advantage A and weight w of a token:

    clip    loss = -w * A * r           and the constant bound in place of r where A > 0, r > 1 + clip_high or A < 0, r < 1 - clip_low
    cispo   loss = -w * A * logprob * clip(r, 1 - clip_low, 1 + clip_high), the factor held constant

A worked example, clip at 0.2: A = 1, w = 0.5, old_logprob = log 0.5. At logprob = log 0.5, r = 1, loss = -0.5, dloss/dlogprob = -0.5.
At logprob = log 0.75, r = 1.5 > 1.2 is clipped: loss = -0.5 * 1.2 = -0.6, dloss/dlogprob = 0.
With A = -1 it is not clipped there: loss = dloss/dlogprob = 0.75.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bcr_kernels._checks import check_vector, require
from bcr_kernels._matmul import compute_dtype

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class LossRule:
    """How the loss of one token depends on its log-prob. Constants only: one rule serves a whole run.

    kind: "clip" or "cispo", see the head of this module.
    clip_low, clip_high: the ratio is held between 1 - clip_low and 1 + clip_high. CISPO's paper has no lower bound: clip_low = 1.
    importance_cap: None, or C for the truncated importance weight min(exp(old_logprob - behaviour_logprob), C), a constant that
        multiplies the policy term and not the KL term ("TIS"). It corrects for a sampler whose numbers differ from the trainer's:
        `old_logprobs` are then the *trainer's*, of the weights that sampled, and `behaviour_logprobs` the *sampler's*.
    kl_coef: adds w * kl_coef * (exp(d) - d - 1) with d = reference_logprob - logprob, the k3 estimate of KL(policy || reference)
        (Schulman 2020, "Approximating KL divergence"); weighted like the policy term, but not by the advantage.
    """

    kind: Literal["clip", "cispo"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    importance_cap: float | None = None
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        require(self.kind in ("clip", "cispo"), "kind", f"must be 'clip' or 'cispo', got {self.kind!r}")
        require(0 <= self.clip_low <= 1, "clip_low", f"must be in [0, 1] (the ratio is never negative), got {self.clip_low}")
        require(self.clip_high >= 0, "clip_high", f"must not be negative, got {self.clip_high}")  # inf: no upper bound
        cap = self.importance_cap
        require(cap is None or (math.isfinite(cap) and cap > 0), "importance_cap", f"must be None or a positive number, got {cap}")
        require(math.isfinite(self.kl_coef) and self.kl_coef >= 0, "kl_coef", f"must be finite and not negative, got {self.kl_coef}")


def token_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, behaviour: Tensor | None, reference: Tensor | None, rule: LossRule
) -> Tensor:
    """loss[T], already times the weights, of vectors [T] of one float dtype. The whole rule; autograd through it gives dloss/dlogprob.

    Where the bound replaces r, r is computed from log-ratio 0 first: exp may overflow there, and 0 * inf in the backward would be NaN.
    """
    log_ratio = logprobs - old
    lower, upper = 1 - rule.clip_low, 1 + rule.clip_high
    ratio = log_ratio.detach().exp()
    if rule.kind == "clip":
        too_high, too_low = (ratio > upper) & (advantages >= 0), (ratio < lower) & (advantages < 0)
        ratio = log_ratio.masked_fill(too_high | too_low, 0.0).exp()
        policy = -advantages * ratio.masked_fill(too_high, upper).masked_fill(too_low, lower)
    else:
        policy = -advantages * ratio.clamp(lower, upper) * logprobs
    if rule.importance_cap is not None:
        assert behaviour is not None
        policy = policy * (old - behaviour).exp().clamp(max=rule.importance_cap)
    if rule.kl_coef > 0:
        assert reference is not None
        policy = policy + rule.kl_coef * _k3(reference - logprobs)
    return policy * weights


def _k3(log_ratio: Tensor) -> Tensor:
    """exp(d) - d - 1: with d = log q(x) - log p(x) and x drawn from p, its mean is KL(p || q), and no term is negative."""
    return torch.expm1(log_ratio) - log_ratio


def active_tokens(advantages: Tensor, weights: Tensor, rule: LossRule) -> Tensor:
    """mask[T]: tokens whose loss can depend on their log-prob. With a KL term a zero advantage does not silence a token."""
    return weights != 0 if rule.kl_coef > 0 else (weights * advantages) != 0


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    rule: LossRule,
    *,
    behaviour_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The loss of each token, already multiplied by its weight, and sums for the logs.

    All inputs are floating [T] on one device; they are taken to float32 (to float64 if `logprobs` is float64).
    logprobs: of the policy that is trained, with gradient. old_logprobs: the ratio's denominator (the trainer's at sampling time, or
    the sampler's own). advantages, weights: per token. behaviour_logprobs: the sampler's, required by `rule.importance_cap`.
    reference_logprobs: required by `rule.kl_coef > 0`.

    Returns (loss[T], metrics). Sum the losses over tokens, packs and ranks. Tokens with weight * advantage = 0 (with a KL term: with
    weight = 0) are *inactive*: their loss is 0 whatever their log-probs hold, and no metric counts them. Each metric is a 0-d float64
    tensor without gradient; add them over packs and ranks, except `max_...`, of which the maximum is the total (see `add_metrics`):

        tokens                  active tokens, the denominator of every mean
        loss_sum                sum of loss[T]
        ratio_sum               sum of r = exp(logprob - old_logprob)
        clipped_high, _low      tokens whose ratio was replaced by the bound (clip), or lies beyond it (cispo)
        policy_kl_sum           k3 of r: how far the policy has moved from old
        mismatch_abs_sum, max_mismatch_abs   |delta| between trainer and sampler: delta = old_logprob - behaviour_logprob where the
        mismatch_kl_sum         latter is given, else logprob - old_logprob (old is then the sampler's); k3 of exp(delta)
        importance_capped       tokens whose importance weight met the cap (only with importance_cap)
        importance_sum          sum of the truncated importance weights (only with importance_cap)
        reference_kl_sum        k3 towards the reference (only with kl_coef > 0)

    Raises ValueError naming the argument for wrong shapes, dtypes, devices, or a missing vector.
    """
    old, behaviour, reference = check_loss_vectors(logprobs, old_logprobs, weights, rule, behaviour_logprobs, reference_logprobs)
    check_vector("logprobs", logprobs, logprobs)
    check_vector("advantages", advantages, logprobs)
    dtype = compute_dtype(logprobs)
    advantages, weights = advantages.detach().to(dtype), weights.detach().to(dtype)
    active = active_tokens(advantages, weights, rule)

    def of_active(vector: Tensor) -> Tensor:  # an inactive token's log-probs may be anything, also NaN: they become 0 first
        return torch.where(active, vector.to(dtype), 0.0)

    current, old = of_active(logprobs), of_active(old)
    behaviour = None if behaviour is None else of_active(behaviour)
    reference = None if reference is None else of_active(reference)
    loss = token_loss(current, old, advantages, of_active(weights), behaviour, reference, rule)
    loss = torch.where(active, loss, 0.0)
    return loss, _metrics(loss.detach(), current.detach(), old, advantages, active, rule, behaviour, reference)


def check_loss_vectors(
    like: Tensor, old: Tensor, weights: Tensor, rule: LossRule, behaviour: Tensor | None, reference: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Each given vector is floating [T] like `like`'s rows; what the rule needs is there. Returns (old, behaviour, reference) detached."""
    require(isinstance(rule, LossRule), "rule", f"must be a LossRule, got {type(rule).__name__}")
    check_vector("old_logprobs", old, like)
    check_vector("weights", weights, like)
    require(rule.importance_cap is None or behaviour is not None, "behaviour_logprobs", "are required by importance_cap")
    require(rule.kl_coef == 0 or reference is not None, "reference_logprobs", "are required by kl_coef > 0")
    require(rule.kl_coef > 0 or reference is None, "reference_logprobs", "are given, but kl_coef is 0: they would not be used")
    if behaviour is not None:
        check_vector("behaviour_logprobs", behaviour, like)
        behaviour = behaviour.detach()
    if reference is not None:
        check_vector("reference_logprobs", reference, like)
        reference = reference.detach()
    return old.detach(), behaviour, reference


@torch.no_grad()
def _metrics(
    loss: Tensor,
    current: Tensor,
    old: Tensor,
    advantages: Tensor,
    active: Tensor,
    rule: LossRule,
    behaviour: Tensor | None,
    reference: Tensor | None,
) -> Metrics:
    """Sums over the active tokens. Every log-prob of an inactive one is 0 here, so that k3 and |delta| vanish for it by themselves."""
    log_ratio = current - old
    ratio = torch.where(active, log_ratio.exp(), 0.0)
    mismatch = log_ratio if behaviour is None else old - behaviour
    above, below = active & (ratio > 1 + rule.clip_high), active & (ratio < 1 - rule.clip_low)
    if rule.kind == "clip":
        above, below = above & (advantages > 0), below & (advantages < 0)
    metrics = {
        "tokens": _total(active),
        "loss_sum": _total(loss),
        "ratio_sum": _total(ratio),
        "clipped_high": _total(above),
        "clipped_low": _total(below),
        "policy_kl_sum": _total(_k3(log_ratio)),
        "mismatch_abs_sum": _total(mismatch.abs()),
        "max_mismatch_abs": torch.cat([mismatch.abs(), mismatch.new_zeros(1)]).amax().double(),
        "mismatch_kl_sum": _total(_k3(mismatch)),
    }
    if rule.importance_cap is not None and behaviour is not None:
        importance = mismatch.exp()
        metrics["importance_capped"] = _total(active & (importance > rule.importance_cap))
        metrics["importance_sum"] = _total(torch.where(active, importance.clamp(max=rule.importance_cap), 0.0))
    if reference is not None:
        metrics["reference_kl_sum"] = _total(_k3(reference - current))
    return metrics


def _total(values: Tensor) -> Tensor:
    """Counts and sums alike as float64, so that they can be stacked and added exactly over many packs."""
    return values.sum(dtype=torch.float64)


def add_metrics(total: Metrics, more: Metrics) -> Metrics:
    """The metrics of two packs or ranks together: sums are added, `max_...` take the maximum. {} is the empty total."""
    if not total:
        return dict(more)
    require(total.keys() == more.keys(), "more", f"has metrics {sorted(more)}, the total {sorted(total)}")
    return {key: torch.maximum(total[key], more[key]) if key.startswith("max_") else total[key] + more[key] for key in total}
