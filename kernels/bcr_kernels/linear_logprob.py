"""`linear_logprob`: hidden states and the head's weight to log-prob, entropy and log-sum-exp, with no [T, V] tensor in memory.

The forward reduces logits to three numbers per token as they are made. The backward makes them again (recompute): four products in
all, the price of leaving the loss free. Where the loss is a clipped policy loss, `linear_policy_loss` needs three.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from bcr_kernels import reference
from bcr_kernels._checks import IGNORED, check_head
from bcr_kernels._rows import Backend, active_rows, choose_backend, inverse_temperature, put, take
from bcr_kernels.reference import RowStatistics


class LogProbs(NamedTuple):
    """Per token, [T] float32 (float64 for float64 inputs). `entropy` is None unless asked for."""

    logprob: Tensor
    entropy: Tensor | None
    logsumexp: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = False,
    active_tokens: int | None = None,
    backend: Backend = "auto",
) -> LogProbs:
    """Log-prob of each target under softmax(hidden @ weight.T / temperature) over the full vocabulary, in nats.

    hidden[T, H], weight[V, H]: bfloat16, float32 or float64 (reference backend only), of one dtype and device. T may be 0. A weight
        that is not contiguous (a transposed view) is copied by the Triton backend.
    targets[T]: int64 or int32 in [0, V), or -100: such a token costs nothing, its results are 0 and it has no gradient.
    temperature: a positive number, or one per token, float [T]. A constant: it gets no gradient.
    active_tokens: how many targets are not -100, if the caller knows. Without it a call on CUDA waits once for the device.
    backend: "auto" chooses by device and dtype; "triton" and "reference" force.

    Returns LogProbs, each [T]: logprob = z_target - logsumexp, entropy = logsumexp - sum_v p_v z_v, logsumexp = log sum_v exp(z_v) with
    z the logits over the temperature. All three are differentiable in hidden and weight; a frozen one skips its product.
    Logits are float32, never bfloat16. Called under autocast, it computes in the dtypes it is given.

    Raises ValueError naming the argument. On CUDA the values of targets and temperature are checked in debug mode alone
    (`set_debug`); a target out of range there reads no memory outside the weight: it gives NaN, and a device assertion in the backward.
    """
    check_head(hidden, weight, targets, temperature)
    module = backend_module(choose_backend(backend, hidden))
    rows = active_rows(targets != IGNORED, active_tokens)
    inv_temperature = inverse_temperature(temperature, hidden, rows)
    logprob, entropy, logsumexp = _LinearLogProb.apply(hidden, weight, take(targets, rows), inv_temperature, rows, with_entropy, module)
    return LogProbs(logprob, entropy, logsumexp)


def backend_module(name: str) -> ModuleType:
    """The module that has `row_statistics`, `logprob_backward` and `policy_gradients`."""
    if name == "reference":
        return reference
    from bcr_kernels._triton import backend

    return backend


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, inv_temperature, rows, with_entropy, module):
        ctx.set_materialize_grads(False)
        statistics: RowStatistics = module.row_statistics(take(hidden, rows), weight, targets, inv_temperature, with_entropy)
        ctx.save_for_backward(hidden, weight, targets, inv_temperature, rows, *statistics)
        ctx.module = module
        return tuple(None if part is None else put(part, rows, hidden.shape[0]) for part in statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *upstream: Tensor | None):  # type: ignore[no-untyped-def]
        hidden, weight, targets, inv_temperature, rows, *statistics = ctx.saved_tensors  # type: ignore[attr-defined]
        needs = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        nothing = [None] * 5
        if all(part is None for part in upstream) or not any(needs):
            return None, None, *nothing
        logprob, entropy, logsumexp = (None if part is None else take(part, rows) for part in upstream)
        zero = torch.zeros_like(inv_temperature)
        grads = RowStatistics(zero if logprob is None else logprob, entropy, zero if logsumexp is None else logsumexp)
        hidden_grad, weight_grad = ctx.module.logprob_backward(  # type: ignore[attr-defined]
            take(hidden, rows), weight, targets, inv_temperature, RowStatistics(*statistics), grads, needs
        )
        if hidden_grad is not None:
            hidden_grad = put(hidden_grad.to(hidden.dtype), rows, hidden.shape[0])
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype), *nothing
