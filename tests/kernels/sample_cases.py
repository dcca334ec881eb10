"""Oracles of the sampler's randomness: MurmurHash3 from its description, and the chi-square test."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def murmur3(data: bytes, seed: int) -> int:
    """MurmurHash3_x86_32 of whole 4-byte words."""

    def rotated(word: int, bits: int) -> int:
        return (word << bits | word >> (32 - bits)) % 2**32

    x = seed
    for start in range(0, len(data), 4):
        word = int.from_bytes(data[start : start + 4], "little")
        x = rotated(x ^ rotated(word * 0xCC9E2D51 % 2**32, 15) * 0x1B873593 % 2**32, 13) * 5 + 0xE6546B64
        x %= 2**32
    x ^= len(data)
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def expected_hash(key: int, token: int) -> int:
    """What `noise.keyed_hash` promises, of a signed or unsigned 64-bit key."""
    low, high = key % 2**32, (key >> 32) % 2**32
    return murmur3(token.to_bytes(4, "little") + high.to_bytes(4, "little"), low)


def random_keys(count: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def chi_square_excess(counts: Tensor, probabilities: Tensor) -> float:
    """How many standard deviations Pearson's statistic lies above its mean; entries expected fewer than 8 times are put together."""
    expected = probabilities.double() * counts.sum()
    common = expected >= 8
    parts = [(counts[common].double(), expected[common])]
    if not bool(common.all()):
        parts.append((counts[~common].sum()[None].double(), expected[~common].sum()[None]))
    observed, wanted = (torch.cat(part) for part in zip(*parts, strict=True))
    statistic = float(((observed - wanted).square() / wanted.clamp(min=1e-9)).sum())
    freedom = len(wanted) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)
