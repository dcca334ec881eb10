"""`linear_sample`: hidden states and the head's weight to a sampled token and its log-prob, with no [B, V] tensor in memory on CUDA.

Sampling is the Gumbel-max trick: argmax_v (z_v + g_v) with independent Gumbel g_v is distributed as softmax(z). The noise is keyed
(`noise.py`), so the token is a function of its row of logits and its key alone. The log-prob is not a by-product but the learner's own:
`linear_logprob`'s row statistics at the sampled token, so that equal hidden states give equal log-probs to the last bit.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from bcr_kernels import sample_reference
from bcr_kernels._checks import check_head_weight, check_vector, is_number, require, values_are_checked
from bcr_kernels._rows import Backend, choose_backend, inverse_temperature


class Sample(NamedTuple):
    """token[B] int64; logprob[B] float32 (float64 for float64 inputs), None where it was not asked for."""

    token: Tensor
    logprob: Tensor | None


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    with_logprob: bool = True,
    backend: Backend = "auto",
) -> Sample:
    """One token per row from softmax(hidden @ weight.T / temperature) over the full vocabulary, and its log-prob in nats.

    hidden[B, H], weight[V, H]: bfloat16, float32 or float64 (reference backend only), of one dtype and device. B may be 0, V is below
        2^31. No gradient flows.
    keys[B] int64: the randomness of each row. Equal keys and logits give equal tokens. Two rows that share a key share their noise, so
        derive keys by a hash of whatever tells draws apart (seed, request, sample, position).
    temperature: a number, or one per row, float [B]. 0 is greedy: the largest logit, and the log-prob is then that at temperature 1.
    with_logprob: False saves the second product. The log-probs can then be had later, for many rows at once and with the same bits on the
        Triton backend, from `linear_logprob(hidden, weight, token, temperature=...)`.
    backend: "auto" chooses by device and dtype, as `linear_logprob` does; "triton" and "reference" force.

    Ties go to the lowest id. A row with a NaN among its logits gets some token of the vocabulary and the log-prob NaN.
    Tokens of the two backends agree but for rows whose two best noisy logits lie within their rounding of each other.
    Raises ValueError, beginning with the argument's name, for what does not fit.
    """
    _check(hidden, weight, keys, temperature)
    module = _backend_module(choose_backend(backend, hidden))
    with torch.no_grad():
        if isinstance(temperature, Tensor):
            greedy = temperature == 0
            at = inverse_temperature(torch.where(greedy, 1.0, temperature), hidden, None)
            noisy: Tensor | None = (~greedy).to(at.dtype)
        else:
            at = inverse_temperature(temperature or 1.0, hidden, None)
            noisy = None if temperature == 0 else torch.ones_like(at)
        token, logprob = module.sample(hidden, weight, keys, at, noisy, with_logprob)
    return Sample(token, logprob)


def _backend_module(name: str) -> ModuleType:
    """The module that has `sample`."""
    if name == "reference":
        return sample_reference
    from bcr_kernels._triton import sample_backend

    return sample_backend


def _check(hidden: Tensor, weight: Tensor, keys: Tensor, temperature: float | Tensor) -> None:
    check_head_weight(hidden, weight)
    require(weight.shape[0] < 1 << 31, "weight", f"must have fewer than 2^31 vocabulary rows, got {weight.shape[0]}")
    check_vector("keys", keys, hidden, integer=True)
    require(keys.dtype == torch.int64, "keys", f"must be int64, got {keys.dtype}")
    if not isinstance(temperature, Tensor):
        wanted = f"must be 0 (greedy), a positive finite number or a tensor [B], got {temperature!r}"
        require(is_number(temperature) and temperature >= 0, "temperature", wanted)
        return
    check_vector("temperature", temperature, hidden)
    if values_are_checked(temperature):
        good = torch.isfinite(temperature) & (temperature >= 0)
        require(bool(good.all()), "temperature", "must be finite and not negative in every row")
