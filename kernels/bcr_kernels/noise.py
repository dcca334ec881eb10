"""Keyed Gumbel noise: one number for each (key, vocabulary id), the same wherever and in whatever batch it is made.

The hash is MurmurHash3_x86_32 (Appleby, public domain) of eight bytes, with the low half of the key as its seed:

    hash(key, id) = MurmurHash3_x86_32(id as 4 bytes | high half of key as 4 bytes, little endian; seed = low half of key)

The id's block comes first, so that both halves of the key pass every later step, and its product can be made once per column. The noise
is the Gumbel variable -log(e) with e = -log(1 - u) exponential and u = (hash + 1/2) / 2^32. Both tails are kept: the smaller of u
and 1 - u is made with 24 significant bits, and what rounding takes from 1 - u is added back to its logarithm. So e lies in
[1.2e-10, 22.9], is never 0 or infinite, and a token's probability is exact to 1.2e-10.

    >>> keys = torch.tensor([0, 0x0123456789ABCDEF])
    >>> [[f"{value & 0xFFFFFFFF:08x}" for value in row] for row in keyed_hash(keys, 0, 3).tolist()]
    [['63852afc', '53075d44', 'c61fa2f4'], ['3f20072e', '58ced2b3', 'b6cb5b0b']]
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLY_1, MULTIPLY_2 = 0xCC9E2D51, 0x1B873593  # of a block, before it enters
STEP_ADD = 0xE6546B64  # after each block
FINISH_1, FINISH_2 = 0x85EBCA6B, 0xC2B2AE35
LENGTH = 8  # bytes hashed
BLOCK = 1 << 16  # elements at a time: what stays in a core's cache


def gumbel_noise(keys: Tensor, first: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """noise[B, count] of the ids first .. first + count - 1 for keys[B] int64, in nats."""
    noise = torch.empty((keys.shape[0], count), dtype=dtype, device=keys.device)
    rows = max(1, BLOCK // max(1, count))
    for start in range(0, keys.shape[0], rows):
        noise[start : start + rows] = _gumbel(keyed_hash(keys[start : start + rows], first, count))
    return noise


def keyed_hash(keys: Tensor, first: int, count: int) -> Tensor:
    """hash[B, count] of the ids first .. first + count - 1 for keys[B] int64: the 32 bits as signed int32, all arithmetic wrapping."""
    ids = torch.arange(first, first + count, dtype=torch.int32, device=keys.device)
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)
    x = low[:, None] ^ _block(ids)[None, :]
    _step_(x)
    x ^= _block(high)[:, None]
    _step_(x)
    x ^= LENGTH
    x ^= _shift_right(x, 16)
    x *= _signed(FINISH_1)
    x ^= _shift_right(x, 13)
    x *= _signed(FINISH_2)
    x ^= _shift_right(x, 16)
    return x


def _gumbel(bits: Tensor) -> Tensor:
    """float32 noise from hashed int32 bits. Without a selection, which PyTorch does not vectorise on a CPU."""
    signed = bits.float().add_(0.5).mul_(2.0**-32)  # u below 1/2, u - 1 above
    one = (bits >> 31).float().add_(1)  # 1 below, 0 above
    rest = one - signed  # 1 - u, exact above 1/2
    lost = one.sub_(rest).sub_(signed)  # what rounding took from it below
    return rest.log().add_(lost.div_(rest)).neg_().log_().neg_()


def _block(word: Tensor) -> Tensor:
    return _rotate(word * _signed(MULTIPLY_1), 15) * _signed(MULTIPLY_2)


def _step_(x: Tensor) -> None:
    x.copy_(_rotate(x, 13)).mul_(5).add_(_signed(STEP_ADD))


def _rotate(x: Tensor, bits: int) -> Tensor:
    return (x << bits).bitwise_or_(_shift_right(x, 32 - bits))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical: int32 shifts copy the sign bit, which the mask takes off."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
