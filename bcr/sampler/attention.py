"""Attention of a step: each decoding row over its own context, each chunk of a prompt over what precedes it, from the KV cache.

Read in place where a block of the cache holds a whole request, gathered where blocks are small: the numbers are the same to the last bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bcr.model.row_attention import QUERY_ROWS, attend, attend_chunk, readable, round_up
from bcr.sampler.batch import Batch
from bcr.sampler.kv_cache import KVCache
from bcr.sampler.scheduler import Chunk

CUT_BYTES = 1 << 20  # of keys and values: to read them takes as long as the calls for one more piece of rows


@dataclass(frozen=True)
class Run:
    """Decoding rows `rows` that are attended to together: `length` places of each are read, `unseen` [R,1,1,U] of the last U not."""

    rows: slice
    blocks: slice | Tensor  # a stretch of the cache, read in place; or a table [R,W] of small blocks to gather
    length: int
    unseen: Tensor


class CachedAttention:
    """attention(layer, query[T,Q,D], key[T,K,D], value[T,K,D]) -> [T,Q,D], with the new keys and values written to the cache first.

    The T tokens are one for each row of the batch, then the chunks, then padding, whose attention is 0.
    """

    def __init__(self, cache: KVCache, batch: Batch, chunks: Sequence[Chunk]) -> None:
        self.cache, self.chunks = cache, chunks
        self.rows = len(batch.drafts)
        table, size, device = batch.table.long(), cache.block_size, batch.device
        self.blocks = table.gather(1, (batch.position // size)[:, None]).squeeze(1)
        self.places = batch.position % size
        self.tables = [torch.tensor(chunk.blocks, device=device) for chunk in chunks]
        for chunk, blocks in zip(chunks, self.tables, strict=True):
            positions = torch.arange(chunk.start, chunk.start + len(chunk.token_ids), device=device)
            self.blocks = torch.cat([self.blocks, blocks[positions // size]])
            self.places = torch.cat([self.places, positions % size])
        place_bytes = 2 * cache.keys[0].shape[1] * cache.keys[0].shape[3] * cache.memory.itemsize
        self.runs = [self._run(batch, table, rows) for rows in stretches(batch, size, place_bytes)]
        self.padded: Tensor | None = None

    def _run(self, batch: Batch, table: Tensor, rows: slice) -> Run:
        held = [draft.cached for draft in batch.drafts[rows]]
        length = readable(max(held))
        unseen = torch.arange(min(held), length, device=batch.device) > batch.position[rows, None]
        if length <= self.cache.block_size:
            first = batch.drafts[rows.start].blocks[0]
            return Run(rows, slice(first, first + rows.stop - rows.start), length, unseen[:, None, None])
        return Run(rows, fitted(table[rows], length, self.cache.block_size), length, unseen[:, None, None])

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        real = self.blocks.shape[0]
        self.cache.store(layer, key[:real], value[:real], self.blocks, self.places)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        query_heads, size, key_heads = query.shape[1], query.shape[2], key.shape[1]
        share = query_heads // key_heads
        if self.padded is None:  # beyond the `share` queries of a key head zeros, which serve all layers
            self.padded = query.new_zeros(self.rows, key_heads, round_up(share, QUERY_ROWS), size)
        torch.mul(query[: self.rows].view(-1, key_heads, share, size), size**-0.5, out=self.padded[:, :, :share])
        parts = []
        for run in self.runs:
            out = attend(self.padded[run.rows], read(keys, run), read(values, run), run.unseen)
            parts.append(out[:, :, :share].reshape(-1, query_heads, size).to(query.dtype))
        start = self.rows
        for chunk, blocks in zip(self.chunks, self.tables, strict=True):
            stop = start + len(chunk.token_ids)
            length = readable(chunk.start + stop - start)
            key_rows, value_rows = (gathered(x, fitted(blocks[None], length, self.cache.block_size))[0] for x in (keys, values))
            parts.append(attend_chunk(query[start:stop], key_rows, value_rows, chunk.start))
            start = stop
        if query.shape[0] > real:
            parts.append(query.new_zeros(query.shape[0] - real, query_heads, size))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def stretches(batch: Batch, block_size: int, place_bytes: int) -> list[slice]:
    """Rows that are read together: all of them where blocks are gathered; else those on neighbouring blocks, cut where it is worth it."""
    rows = len(batch.drafts)
    if rows and readable(max(draft.cached for draft in batch.drafts)) > block_size:
        return [slice(0, rows)]
    if batch.cuts is None:  # they stay as long as the rows do, for all contexts grow alike
        first = [draft.blocks[0] for draft in batch.drafts]
        borders = [0, *(row for row in range(1, rows) if first[row] != first[row - 1] + 1), rows]
        held = [draft.cached for draft in batch.drafts]
        batch.cuts = [
            slice(*cut)
            for start, stop in itertools.pairwise(borders)
            for cut in worthwhile_cuts(held, start, stop, place_bytes)
            if start < stop
        ]
    return batch.cuts


def worthwhile_cuts(held: Sequence[int], start: int, stop: int, place_bytes: int) -> list[tuple[int, int]]:
    """Rows start .. stop-1 in pieces: cut again and again where that spares the most, as long as it spares CUT_BYTES of each layer.

    A piece is read as far as its longest context, held[row]; `place_bytes` are the key and value of one place in one layer.

    >>> worthwhile_cuts([900, 800, 810, 50, 60], 0, 5, place_bytes=1024)
    [(0, 3), (3, 5)]
    """
    if stop - start < 2:
        return [(start, stop)]
    before = list(itertools.accumulate(held[start:stop], max))
    after = list(itertools.accumulate(reversed(held[start:stop]), max))[::-1]
    count, longest = stop - start, before[-1]
    spared, best = max(((longest - before[k - 1]) * k + (longest - after[k]) * (count - k), k) for k in range(1, count))
    if spared * place_bytes < CUT_BYTES:
        return [(start, stop)]
    return [piece for a, b in ((start, start + best), (start + best, stop)) for piece in worthwhile_cuts(held, a, b, place_bytes)]


def read(cached: Tensor, run: Run) -> Tensor:
    """Keys or values [R,K,length,D] of a run: a view where they lie in one stretch."""
    if isinstance(run.blocks, slice):
        return cached[run.blocks, :, : run.length]
    return gathered(cached, run.blocks)[:, :, : run.length]


def gathered(cached: Tensor, table: Tensor) -> Tensor:
    """cached[blocks,K,block_size,D], table[R,W] -> [R,K,W*block_size,D]; no copy for one block of one row."""
    if table.shape == (1, 1):
        return cached[int(table)][None]
    rows, width = table.shape
    _, heads, block_size, size = cached.shape
    return cached[table].transpose(1, 2).reshape(rows, heads, width * block_size, size)


def fitted(table: Tensor, length: int, block_size: int) -> Tensor:
    """The table [R,W] cut or filled up (with block 0, which is masked) to blocks for `length` places."""
    width = -(-length // block_size)
    return F.pad(table, (0, width - table.shape[1]))
