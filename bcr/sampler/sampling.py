"""From a row of logits to a token and its log-prob, with keyed randomness.

The token is a pure function of (its row of logits, seed, request id, sample index, position): one uniform number, keyed by the
last four, and the inverse of the distribution's cumulative sum. There is no stream of random numbers, so batch composition,
preemption and the number of processes change nothing (contract 9).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from bcr_kernels.reference import logprob_of_logits

WIDE, SPAN = 512, 64  # vocabularies beyond WIDE are summed in spans of SPAN tokens first
ROWS = 16  # rows whose copy in float64, which torch makes to sum them, stays in a CPU's cache


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `temperature` 0 is greedy, and its log-probs are those at temperature 1.

    `n` rollouts are drawn for each request. A completion ends with the first of `stop_token_ids`, or with the token that completes one of
    `stop_strings`; it includes that token. `top_k` (0: off), `top_p` (1: off) and `min_p` (0: off; relative to the likeliest token) cut the
    distribution, in this order, for evaluation: log-probs stay those of the full vocabulary, so training refuses them (contract 2).
    Raises ValueError for what is out of range.
    """

    temperature: float = 1.0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.temperature < float("inf")):
            raise ValueError(f"sampling.temperature is {self.temperature}; it must be 0 (greedy) or a positive finite number.")
        if self.n < 1:
            raise ValueError(f"sampling.n is {self.n}; every request needs at least 1 rollout.")
        if not self.stop_token_ids:
            raise ValueError("sampling.stop_token_ids is empty, so no completion could ever end.")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k is {self.top_k}; it must be 0 (off) or the number of tokens to keep.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p is {self.top_p}; it must be above 0 and at most 1 (off).")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling.min_p is {self.min_p}; it must be from 0 (off) to 1.")
        if "" in self.stop_strings:
            raise ValueError("sampling.stop_strings holds an empty string, which every completion contains.")

    @property
    def truncated(self) -> bool:
        """Whether tokens are drawn from less than the whole distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def sample(logits: Tensor, params: SamplingParams, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [B] int64, log-probs [B] float32) from logits [B,V], row keys [B] int64 and positions [B] int64 in the completion.

    The log-prob is that of the full vocabulary at the sampling temperature, computed as the learner computes it. No row looks at another.
    """
    scaled = torch.mul(logits, 1.0 / (params.temperature or 1.0), out=logits.new_empty(logits.shape, dtype=torch.float32))  # rows together
    if params.temperature == 0:
        tokens = scaled.argmax(dim=-1)
    else:
        weights = (scaled - scaled.amax(dim=-1, keepdim=True)).exp_()
        tokens = inverse_cdf(truncate(weights, params) if params.truncated else weights, keyed_uniform(keys, positions))
    return tokens, logprob_of_logits(scaled, tokens)


def inverse_cdf(weights: Tensor, numbers: Tensor) -> Tensor:
    """The token [B] at which the cumulative sum of weights[B,V] (not normalised) exceeds numbers[B] (in [0,1)) of the whole.

    Sums are float64. Over a large vocabulary the span of SPAN tokens is found first, then the token in it.
    """
    vocabulary = weights.shape[1]
    if vocabulary <= WIDE:
        return above(weights.double().cumsum(dim=-1), numbers)[0]
    padded = torch.nn.functional.pad(weights, (0, -vocabulary % SPAN)) if vocabulary % SPAN else weights
    padded = padded.unflatten(1, (-1, SPAN))
    sums = torch.cat([rows.sum(dim=-1, dtype=torch.float64) for rows in padded.split(ROWS)])
    span, before, target = above(sums.cumsum(dim=-1), numbers)
    within = padded[torch.arange(len(span), device=span.device), span].double().cumsum(dim=-1)
    rest = (target - before).clamp(max=torch.nextafter(within[:, -1], torch.zeros_like(target)))
    return span * SPAN + torch.searchsorted(within, rest[:, None], right=True).squeeze(1)


def above(cumulative: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(index [B] of the first sum that exceeds the target, the sum before it, the target = number * last sum)."""
    target = numbers * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target[:, None], right=True)
    before = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp(min=0)), 0.0)
    return index.squeeze(1), before.squeeze(1), target


def truncate(weights: Tensor, params: SamplingParams) -> Tensor:
    """weights[B,V] with what top-k, top-p (nucleus: the likeliest tokens that together reach p) and min-p cut off set to 0."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k:
        kept[:, params.top_k :] = False
    shares = torch.where(kept, ordered, 0.0).double()
    before = (shares.cumsum(dim=-1) - shares) / shares.sum(dim=-1, keepdim=True)
    kept &= before < params.top_p
    kept &= ordered >= params.min_p * ordered[:, :1]
    return torch.zeros_like(weights).scatter_(1, order, torch.where(kept, ordered, 0.0))


def row_key(seed: int, request_id: str, sample_index: int) -> int:
    """A signed 64-bit key for one rollout: BLAKE2b of its three names."""
    digest = hashlib.blake2b(f"{seed}\0{request_id}\0{sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def keyed_uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Uniform float64 in [0,1) for each (key, position)."""
    return shift_right(keyed_bits(keys, positions), 11).double() * 2.0**-53


def keyed_bits(keys: Tensor, positions: Tensor) -> Tensor:
    """64 random bits, int64, for each (key, position): splitmix64 (Steele, Lea, Flood 2014) in wrapping int64 arithmetic."""
    x = keys + (positions + 1) * GOLDEN
    x = (x ^ shift_right(x, 30)) * MIX_1
    x = (x ^ shift_right(x, 27)) * MIX_2
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 shifts copy the sign bit, which the mask takes off."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
