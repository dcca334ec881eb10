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


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `temperature` 0 is greedy, and its log-probs are those at temperature 1.

    `n` rollouts are drawn for each request. A completion ends with the first of `stop_token_ids`, which it includes.
    Raises ValueError for a negative temperature, n < 1 or no stop token.
    """

    temperature: float = 1.0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.temperature < float("inf")):
            raise ValueError(f"sampling.temperature is {self.temperature}; it must be 0 (greedy) or a positive finite number.")
        if self.n < 1:
            raise ValueError(f"sampling.n is {self.n}; every request needs at least 1 rollout.")
        if not self.stop_token_ids:
            raise ValueError("sampling.stop_token_ids is empty, so no completion could ever end.")


def sample(logits: Tensor, params: SamplingParams, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [B] int64, log-probs [B] float32) from logits [B,V], row keys [B] int64 and positions [B] int64 in the completion.

    The log-prob is that of the full vocabulary at the sampling temperature. No row looks at another row.
    """
    logprobs = torch.log_softmax(logits.float() / (params.temperature or 1.0), dim=-1)
    if params.temperature == 0:
        tokens = logprobs.argmax(dim=-1)
    else:
        cumulative = logprobs.double().exp().cumsum(dim=-1)
        target = keyed_uniform(keys, positions) * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)  # the first token whose sum exceeds the target
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def row_key(seed: int, request_id: str, sample_index: int) -> int:
    """A signed 64-bit key for one rollout: BLAKE2b of its three names."""
    digest = hashlib.blake2b(f"{seed}\0{request_id}\0{sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def keyed_uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Uniform float64 in [0,1) for each (key, position): splitmix64 (Steele, Lea, Flood 2014) in wrapping int64 arithmetic."""
    x = keys + (positions + 1) * GOLDEN
    x = (x ^ shift_right(x, 30)) * MIX_1
    x = (x ^ shift_right(x, 27)) * MIX_2
    x = x ^ shift_right(x, 31)
    return shift_right(x, 11).double() * 2.0**-53


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 shifts copy the sign bit, which the mask takes off."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
