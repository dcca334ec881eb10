"""Which tile a kernel uses, and how many rows a chunk has. Fixed tables: the same run twice adds in the same order.

Nothing is tuned at run time: autotuning would change the order of additions between runs and needs a device to compile for. Every entry
is compiled ahead of time in the tests, which hold it to no register spills and to the shared memory of its device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bcr_kernels._checks import require

CHUNK_BYTES = 900 * 10**6  # what the kept exponentials or logit gradients of a chunk may take
GEMM_TILE = (128, 256)  # of the matrix library, for filling its waves


@dataclass(frozen=True)
class Tile:
    """A program makes rows x cols logits from slices of `depth` channels, `stages` of them in flight; `group` row tiles share L2."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    tma: bool = False
    group: int = 8


# By compute capability and dtype; another device takes the nearest listed capability below its own.
TILES: dict[tuple[tuple[int, int], torch.dtype], Tile] = {
    ((8, 0), torch.bfloat16): Tile(128, 128, 64, warps=8, stages=4),
    ((8, 6), torch.bfloat16): Tile(128, 128, 32, warps=8, stages=4),
    ((9, 0), torch.bfloat16): Tile(128, 256, 64, warps=8, stages=4, tma=True),
    ((10, 0), torch.bfloat16): Tile(128, 256, 64, warps=8, stages=4, tma=True),
    ((12, 0), torch.bfloat16): Tile(128, 128, 32, warps=8, stages=4),
    ((8, 0), torch.float32): Tile(64, 64, 16, warps=4, stages=3),
}
UNALIGNED_TILE = Tile(128, 128, 64, warps=8, stages=4)  # where TMA is wanted and rows do not begin at multiples of 16 bytes
RESCUE_TILE = Tile(32, 64, 16, warps=4, stages=3)  # rows whose exponentials overflow: rare, so one tile that fits everywhere
INTERPRETER_TILE = Tile(16, 32, 16, warps=1, stages=1, group=2)  # on a CPU: small, so that a test has several tiles
TARGET_ROWS, TARGET_DEPTH = 16, 128
SUM_ROWS, SUM_TILES = 16, 128
SAMPLE_ROWS, SAMPLE_COLS = 64, 128  # at most: two programs share a processor, and one's noise hides behind the other's loads


def tile_for(hidden: Tensor) -> Tile:
    """The tile for the device, dtype and width of hidden[R, H]. ValueError for a device older than every entry."""
    tile = nearest_tile(torch.cuda.get_device_capability(hidden.device), hidden.dtype) if hidden.is_cuda else INTERPRETER_TILE
    aligned = hidden.shape[1] * hidden.element_size() % 16 == 0
    if tile.tma and not aligned:
        return UNALIGNED_TILE if hidden.is_cuda else replace(tile, tma=False)
    return tile


def sample_tile_for(hidden: Tensor) -> Tile:
    """The tile in which tokens of hidden[B, H] are chosen: few rows, all of the weight to read, and noise to make for every logit."""
    return sample_tile(tile_for(hidden))


def sample_tile(tile: Tile) -> Tile:
    return replace(tile, rows=min(tile.rows, SAMPLE_ROWS), cols=min(tile.cols, SAMPLE_COLS))


def nearest_tile(capability: tuple[int, int], dtype: torch.dtype) -> Tile:
    known = [listed for listed, kind in TILES if kind == dtype and listed <= capability]
    require(bool(known), "backend", f"is 'triton', which has no tile for compute capability {capability} and {dtype}; use 'reference'")
    return TILES[max(known), dtype]


def chunk_rows(width: int, row_bytes: int, processors: int) -> int:
    """Rows of a chunk, a multiple of 128: as many as CHUNK_BYTES holds, less what leaves the last wave of the gradient products ragged.

    The hidden gradient of a chunk is [rows, width] in tiles of 128 x 256. On 132 processors and width 1536, 2816 rows are 22 x 6 = 132
    tiles, one full wave; 2944 would be 138 tiles, two waves, the second nearly empty.
    """
    most = max(GEMM_TILE[0], CHUNK_BYTES // row_bytes)

    def filled(rows: int) -> float:
        tiles = -(-rows // GEMM_TILE[0]) * -(-width // GEMM_TILE[1])
        return tiles / (-(-tiles // processors) * processors)

    candidates = range(GEMM_TILE[0] * -(-most // (2 * GEMM_TILE[0])), most + 1, GEMM_TILE[0])
    return max(candidates, key=lambda rows: (round(filled(rows), 2), rows))
