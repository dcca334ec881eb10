"""Attention over the paged cache by `bcr_kernels`: one query for each decoding row, or the chunks of prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bcr.sampler.batch import upload
from bcr.sampler.kv_cache import KVCache
from bcr.sampler.scheduler import Chunk
from bcr_kernels import paged_attention, store_kv
from bcr_kernels._rows import Backend


@dataclass(frozen=True)
class PagedAttention:
    """attention(layer, query[T,Q,D], key[T,K,D], value[T,K,D]) -> [T,Q,D]; the new keys and values are written first.

    The T tokens belong to R sequences laid end to end. slots[T] int64: where each goes (-1: nowhere); table[R,W] int32; lengths[R] int32:
    tokens cached, these included (0: inert, gets zeros); ends[R+1] int32: 0 and the end of each sequence in T; longest: of them, in T.
    """

    cache: KVCache
    slots: Tensor
    table: Tensor
    lengths: Tensor
    ends: Tensor
    longest: int
    backend: Backend

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        store_kv(key, value, keys, values, self.slots, backend=self.backend)
        where = (self.table, self.lengths, self.ends)
        return paged_attention(query, keys, values, *where, max_query_length=self.longest, backend=self.backend)


def chunk_inputs(chunks: Sequence[Chunk], cache: KVCache, backend: Backend) -> tuple[Tensor, Tensor, PagedAttention]:
    """(token_ids[T], positions[T], the attention) of chunks laid end to end: two uploads in all."""
    size, device = cache.block_size, cache.device
    ids, positions, slots = [], [], []
    for chunk in chunks:
        position = torch.arange(chunk.start, chunk.start + len(chunk.token_ids))
        ids.append(torch.tensor(chunk.token_ids))
        positions.append(position)
        slots.append(torch.tensor(chunk.blocks)[position // size] * size + position % size)
    sent = upload(torch.stack([torch.cat(ids), torch.cat(positions), torch.cat(slots)]), torch.int64, device)
    counts, lengths = [len(x) for x in ids], [chunk.start + len(chunk.token_ids) for chunk in chunks]
    width = max(-(-length // size) for length in lengths)
    rows = [(chunk.blocks + [0] * width)[:width] for chunk in chunks]
    small = upload([*lengths, 0, *itertools.accumulate(counts), *itertools.chain.from_iterable(rows)], torch.int32, device)
    count = len(chunks)
    table = small[2 * count + 1 :].view(count, width)
    return sent[0], sent[1], PagedAttention(cache, sent[2], table, small[:count], small[count : 2 * count + 1], max(counts), backend)
