"""`linear_policy_loss`: the output head and the policy loss as one operation whose gradients come out of the forward.

dloss/dlogits of a token is (dloss/dlogprob) * ([v = target] - p_v) / tau, and dloss/dlogprob depends on nothing but the token's own
log-prob and numbers known beforehand (`policy_loss`). So the gradient can be formed while a chunk's logits are still there: three
matrix products (logits, hidden gradient, weight gradient) where recomputing them in the backward takes four.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bcr_kernels._checks import IGNORED, check_head, check_vector, require, values_are_checked
from bcr_kernels._matmul import compute_dtype
from bcr_kernels._rows import Backend, active_rows, choose_backend, inverse_temperature, put, take
from bcr_kernels.linear_logprob import backend_module
from bcr_kernels.policy_loss import LossRule, Metrics, check_loss_vectors, policy_loss, token_loss
from bcr_kernels.policy_loss import active_tokens as active_mask


class PolicyLossOutput(NamedTuple):
    """loss: 0-d, differentiable. metrics: 0-d sums, see `policy_loss`. logprobs[T]: detached, 0 for inactive tokens."""

    loss: Tensor
    metrics: Metrics
    logprobs: Tensor


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    old_logprobs: Tensor,
    segment_ids: Tensor,
    advantages: Tensor,
    weights: Tensor,
    rule: LossRule,
    temperature: float | Tensor = 1.0,
    behaviour_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    with_entropy: bool = False,
    weight_grad_accumulator: Tensor | None = None,
    active_tokens: int | None = None,
    backend: Backend = "auto",
) -> PolicyLossOutput:
    """The policy loss of a pack, summed over its tokens, from hidden states and the head's weight.

    hidden[T, H], weight[V, H], targets[T], temperature, backend: as in `linear_logprob`.
    segment_ids[T]: int64 or int32 in [-1, S); advantages[S]: float. Token t has advantage advantages[segment_ids[t]]; -1 has no loss.
    weights[T]: float, the normaliser of each token (see `segments`): the loss is sum_t weights[t] * (loss of token t under `rule`).
    old_logprobs[T], behaviour_logprobs[T], reference_logprobs[T]: float constants, see `LossRule` and `policy_loss`.
    with_entropy: adds "entropy_sum", in nats over active tokens, to the metrics. It has no gradient.
    weight_grad_accumulator: None, or float32 [V, H] (float64 for float64): the backward adds the weight's gradient to it, in that
        precision, and `weight.grad` is left alone. Without it the gradient is rounded to the weight's dtype once per call.
    active_tokens: the number of active tokens, if the caller knows it; without it a call on CUDA waits once for the device.

    A token is active if its target is not -100, its segment not -1 and weight * advantage not 0 (with a KL term: weight not 0). The
    others never enter a matrix product; `logprobs` is 0 there. Sequence-level ratios (GSPO) do not fit: use `linear_logprob`.

    Returns PolicyLossOutput; multiply or add the loss as usual, the gradients follow. They are computed in the forward, if autograd
    is on and hidden or weight requires them, and handed out by the backward, so a second backward through one call raises
    RuntimeError. Raises ValueError naming the argument.
    """
    check_head(hidden, weight, targets, temperature)
    old, behaviour, reference = check_loss_vectors(hidden, old_logprobs, weights, rule, behaviour_logprobs, reference_logprobs)
    _check_segments(hidden, segment_ids, advantages)
    _check_accumulator(weight, weight_grad_accumulator)
    module = backend_module(choose_backend(backend, hidden))

    dtype = compute_dtype(hidden)
    table = torch.cat([advantages.detach().to(dtype), advantages.new_zeros(1, dtype=dtype)])  # segment -1 reads the appended zero
    advantage_T, weight_T = table[segment_ids], weights.detach().to(dtype)
    mask = (targets != IGNORED) & (segment_ids >= 0) & active_mask(advantage_T, weight_T, rule)
    rows = active_rows(mask, active_tokens)
    vectors = [None if vector is None else take(vector.to(dtype), rows) for vector in (old, advantage_T, weight_T, behaviour, reference)]

    needs = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight))
    call = _Call(module, rows, rule, with_entropy, needs, weight_grad_accumulator)
    inv_temperature = inverse_temperature(temperature, hidden, rows)
    loss, metric_values, logprob = _LinearPolicyLoss.apply(hidden, weight, take(targets, rows), inv_temperature, call, *vectors)
    return PolicyLossOutput(loss, metric_values, put(logprob, rows, hidden.shape[0]))


def _check_segments(hidden: Tensor, segment_ids: Tensor, advantages: Tensor) -> None:
    check_vector("segment_ids", segment_ids, hidden, integer=True)
    check_vector("advantages", advantages, hidden, length=advantages.shape[0] if advantages.ndim == 1 else None)
    if values_are_checked(segment_ids) and segment_ids.numel() > 0:
        lowest, highest = int(segment_ids.min()), int(segment_ids.max())
        count = advantages.shape[0]
        require(lowest >= -1 and highest < count, "segment_ids", f"must be in [-1, {count}), found {lowest} to {highest}")


def _check_accumulator(weight: Tensor, accumulator: Tensor | None) -> None:
    if accumulator is None:
        return
    name, wanted = "weight_grad_accumulator", f"{compute_dtype(weight)} {list(weight.shape)} on {weight.device}"
    matches = (accumulator.dtype, accumulator.shape, accumulator.device) == (compute_dtype(weight), weight.shape, weight.device)
    require(matches, name, f"must be {wanted}, got {accumulator.dtype} {list(accumulator.shape)} on {accumulator.device}")
    require(weight.requires_grad, name, "is given, but weight does not require a gradient")


class _Call(NamedTuple):
    """What stays fixed over a call and is no tensor with a gradient."""

    module: ModuleType
    rows: Tensor | None
    rule: LossRule
    with_entropy: bool
    needs: tuple[bool, ...]
    accumulator: Tensor | None


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, inv_temperature, call: _Call, old, advantages, weights, behaviour, reference):  # type: ignore[no-untyped-def]
        def logprob_gradient(rows: slice, logprob: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = logprob.detach().requires_grad_()
                optional = [None if vector is None else vector[rows] for vector in (behaviour, reference)]
                loss = token_loss(leaf, old[rows], advantages[rows], weights[rows], optional[0], optional[1], call.rule)
                return torch.autograd.grad(loss.sum(), leaf)[0]

        compact = take(hidden, call.rows)
        result = call.module.policy_gradients(compact, weight, targets, inv_temperature, logprob_gradient, call.with_entropy, call.needs)
        loss, metrics = policy_loss(
            result.logprob, old, advantages, weights, call.rule, behaviour_logprobs=behaviour, reference_logprobs=reference
        )
        if call.with_entropy:
            metrics["entropy_sum"] = result.entropy.sum(dtype=torch.float64)
        ctx.gradients = (result.hidden, result.weight)
        ctx.call, ctx.length, ctx.dtype = call, hidden.shape[0], hidden.dtype
        ctx.mark_non_differentiable(result.logprob)
        return loss.sum(), metrics, result.logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError("linear_policy_loss: its gradients were handed out by an earlier backward; call it again for a second one")
        hidden_grad, weight_grad = ctx.gradients
        ctx.gradients = None  # scaled in place and given away: a copy of a [V, H] gradient would double its memory
        call = ctx.call
        if hidden_grad is not None:
            hidden_grad = put(hidden_grad.mul_(upstream).to(ctx.dtype), call.rows, ctx.length)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(upstream)
            if call.accumulator is not None:
                call.accumulator.add_(weight_grad)
                weight_grad = None
            else:
                weight_grad = weight_grad.to(ctx.dtype)
        return hidden_grad, weight_grad, *([None] * 8)
