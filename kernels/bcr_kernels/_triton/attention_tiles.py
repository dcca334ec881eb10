"""Which tile attention uses: fixed by dtype, head dimension and device, never by batch or context.

Decode reads the cache once and does little else: 16 rows, the least that a matrix instruction takes, hold the query heads of a key head.
Plain multiply-adds would leave the matrix units idle, but need a reduction over the head dimension across lanes for every score. Prefill
is bound by arithmetic: 128 rows, which Hopper's wgmma takes as two warp groups. Every entry is compiled ahead of time in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from bcr_kernels._checks import require

SPAN = 512  # positions of the context that one program of a decode step reads; a multiple of every tile's columns


@dataclass(frozen=True)
class AttentionTile:
    """A program makes scores of rows (query, head) x cols (positions) at a time, `stages` of key and value tiles in flight."""

    rows: int
    cols: int
    warps: int
    stages: int


# By padded head dimension, largest first: the first entry that is not larger than the head serves. Prefill also by compute capability;
# another device takes the nearest listed below its own. float32 has no matrix units without TF32: plain multiply-adds, in a tile that
# fits the registers.
DECODE = {256: AttentionTile(16, 32, 4, 3), 128: AttentionTile(16, 64, 8, 3), 16: AttentionTile(16, 128, 4, 3)}
WGMMA = {256: AttentionTile(64, 32, 4, 2), 128: AttentionTile(128, 64, 8, 2), 16: AttentionTile(128, 64, 8, 3)}
MMA = {256: AttentionTile(64, 32, 8, 2), 16: AttentionTile(128, 32, 8, 2)}
PREFILL = {(8, 0): MMA, (9, 0): WGMMA, (10, 0): WGMMA, (12, 0): MMA}
FLOAT32 = AttentionTile(16, 16, 8, 2)
MOST_DECODE_ROWS = 64  # with more query heads than that to a key head, several programs share them
INTERPRETED_CAPABILITY = (9, 0)


def decode_tile(q: Tensor, group: int) -> AttentionTile:
    """For q[Tq, Hq, D] with `group` query heads to a key head."""
    if q.dtype == torch.float32:
        return FLOAT32
    tile = _first_not_larger(DECODE, q.shape[2])
    return replace(tile, rows=min(MOST_DECODE_ROWS, max(tile.rows, triton.next_power_of_2(group))))


def prefill_tile(q: Tensor, capability: tuple[int, int] | None = None) -> AttentionTile:
    """For q[Tq, Hq, D], on its device or one of the `capability` given. ValueError for a device older than every entry."""
    if capability is None:
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else INTERPRETED_CAPABILITY
    known = [listed for listed in PREFILL if listed <= capability]
    require(bool(known), "backend", f"is 'triton', which has no tile for compute capability {capability}; use 'reference'")
    return FLOAT32 if q.dtype == torch.float32 else _first_not_larger(PREFILL[max(known)], q.shape[2])


def _first_not_larger(table: dict[int, AttentionTile], head_dim: int) -> AttentionTile:
    padded = max(16, triton.next_power_of_2(head_dim))
    return next(tile for size, tile in table.items() if size <= padded)
