"""The Triton kernel of `linear_sample`: tiles of logits, as `kernels.py` makes them, and the noisiest entry of each row of a tile."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.language.extra import libdevice

from bcr_kernels import noise as keyed
from bcr_kernels._triton import INTERPRETED
from bcr_kernels._triton.kernels import _products, _tile

MULTIPLY_1, MULTIPLY_2, STEP_ADD = tl.constexpr(keyed.MULTIPLY_1), tl.constexpr(keyed.MULTIPLY_2), tl.constexpr(keyed.STEP_ADD)
FINISH_1, FINISH_2, LENGTH = tl.constexpr(keyed.FINISH_1), tl.constexpr(keyed.FINISH_2), tl.constexpr(keyed.LENGTH)
_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
SMALL = tl.constexpr(2.0**-6)  # from here down, -log(1 - u) is its series: the first term left out is below 2^-26 of it


@triton.jit
def _rotate(x, BITS: tl.constexpr):
    return (x << BITS) | (x >> (32 - BITS))


@triton.jit
def _block(word):
    return _rotate(word * MULTIPLY_1, 15) * MULTIPLY_2


@triton.jit
def _hash(keys, ids):
    """uint32 [ROWS, COLS] of keys[ROWS] int64 and ids[COLS] int32: see `noise.py`."""
    low, high = keys.to(tl.uint32), (keys >> 32).to(tl.uint32)
    x = low[:, None] ^ _block(ids.to(tl.uint32))[None, :]
    x = _rotate(x, 13) * 5 + STEP_ADD
    x = x ^ _block(high)[:, None]
    x = (_rotate(x, 13) * 5 + STEP_ADD) ^ LENGTH
    x = (x ^ (x >> 16)) * FINISH_1
    x = (x ^ (x >> 13)) * FINISH_2
    return x ^ (x >> 16)


@triton.jit
def _log2(x):
    """One instruction on the device, off by at most 2^-22 or 2 units in the last place. The precise one spills registers."""
    return tl.log2(x) if _INTERPRETED else libdevice.fast_log2f(x)


@triton.jit
def _gumbel(bits):
    """-log2(e), e exponential, from hashed bits: Gumbel noise in units of log2, less the constant log2(ln 2)."""
    half = tl.abs(bits.to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 2.0**-32  # the smaller of u and 1 - u
    upper = bits >= 0x80000000
    series = half * (LOG2E + half * (LOG2E / 2 + half * (LOG2E / 3 + half * (LOG2E / 4))))
    exponential = tl.where(upper | (half >= SMALL), -_log2(tl.where(upper, half, 1.0 - half)), series)
    return -_log2(exponential)


@triton.jit(do_not_specialize=["rows", "vocab"])
def sample_kernel(
    hidden, weight, keys, scale, noisy, best, token, rows, vocab,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """best[column tile, r] = the largest of z + noisy[r] * noise over the tile's columns, token[column tile, r] its lowest id.

    z is in units of log2; `noisy` None is 0 everywhere. A NaN counts as -inf. Nothing is summed over the vocabulary, so the tile may be
    another than the learner's: see `tiles.sample_tile_for`.
    """
    row_tile, col_tile = _tile(rows, vocab, ROWS, COLS, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    col = col_tile * COLS + tl.arange(0, COLS)
    inside = row < rows
    acc = _products(hidden, weight, row_tile * ROWS, col_tile * COLS, rows, vocab, WIDTH, ROWS, COLS, DEPTH, TMA)
    score = acc * tl.load(scale + row, mask=inside, other=0.0)[:, None]
    if noisy is not None:
        key = tl.load(keys + row, mask=inside, other=0)
        score += _gumbel(_hash(key, col)) * tl.load(noisy + row, mask=inside, other=0.0)[:, None]
    score = tl.where((col < vocab)[None, :] & (score == score), score, float("-inf"))
    top = tl.max(score, 1)
    first = tl.min(tl.where(score == top[:, None], col[None, :], 0x7FFFFFFF), 1)
    place = col_tile.to(tl.int64) * rows + row
    tl.store(best + place, top, mask=inside)
    tl.store(token + place, first, mask=inside)
