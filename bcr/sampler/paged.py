"""Attention over the paged cache: one query for each decoding row, or the chunks of prompts, by what `bcr.model.ops` chose."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bcr.model.ops import implementations
from bcr.sampler.batch import upload
from bcr.sampler.kv_cache import KVCache
from bcr.sampler.scheduler import Chunk
from bcr_kernels import paged_attention, store_kv
from bcr_kernels._rows import Backend


@dataclass(frozen=True)
class Way:
    """How the paged path computes: the `decoding` of `bcr.model.ops`, and the backend of the kernels of `bcr_kernels`."""

    attention: str
    backend: Backend

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype, head_dim: int) -> Way:
        chosen = implementations(device.type, dtype, head_dim).decoding
        return Way(chosen, "triton" if chosen == "bcr_kernels" else "reference")

    @property
    def block_size(self) -> int:
        """Tokens in a block: few, so that little is copied in a fork and lies idle at the end of a rollout; FlashAttention asks for 256."""
        return 256 if self.attention in ("flash-attn", "torch varlen") else 64

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device in it, so that no graph can be captured."""
        return self.backend == "reference"


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
    way: Way

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        store_kv(key, value, keys, values, self.slots, backend=self.way.backend)
        if self.way.attention == "flash-attn":
            return self._flash_attention(query, keys, values)
        if self.way.attention == "torch varlen":
            return self._varlen_attention(query, keys, values)
        where = (self.table, self.lengths, self.ends)
        return paged_attention(query, keys, values, *where, max_query_length=self.longest, backend=self.way.backend)

    def _flash_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache  # only where it is installed

        if self.longest == 1:
            out: Tensor = flash_attn_with_kvcache(
                query[:, None], keys, values, cache_seqlens=self.lengths, block_table=self.table, causal=True
            )
            return out[:, 0]
        key_ends = F.pad(self.lengths.cumsum(0, dtype=torch.int32), (1, 0))
        places = self.table.shape[1] * keys.shape[1]
        longest = self.longest, places
        return cast(Tensor, flash_attn_varlen_func(query, keys, values, self.ends, key_ends, *longest, causal=True, block_table=self.table))

    def _varlen_attention(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        options: dict[str, Any] = {"window_size": (-1, 0), "enable_gqa": True, "seqused_k": self.lengths, "block_table": self.table}
        places = self.table.shape[1] * keys.shape[1]
        return cast(Tensor, varlen_attn(query, keys, values, self.ends, None, self.longest, places, **options))


def chunk_inputs(chunks: Sequence[Chunk], cache: KVCache, way: Way, tokens: int | None = None) -> tuple[Tensor, Tensor, PagedAttention]:
    """(token_ids[T], positions[T], the attention) of chunks laid end to end, filled up to T = `tokens` with inert ones: two uploads in all.

    A chunk of one token gets an inert one before it: a lone query would go through the kernel for decoding, and the numbers of a prompt
    would depend on how it was cut.
    """
    size, device = cache.block_size, cache.device
    parts, counts, lengths, rows = [], [], [], []
    for chunk in chunks:
        stop = chunk.start + len(chunk.token_ids)
        inert = 1 if len(chunk.token_ids) == 1 and chunk.start else 0
        position = torch.arange(chunk.start - inert, stop)
        slots = torch.tensor(chunk.blocks)[position // size] * size + position % size
        slots[:inert] = -1
        parts.append(torch.stack([torch.tensor([0] * inert + chunk.token_ids), position, slots]))
        counts.append(len(position))
        lengths.append(stop)
        rows.append(chunk.blocks)
    if tokens is not None and tokens > sum(counts):
        parts.append(torch.tensor([[0], [0], [-1]]).expand(3, tokens - sum(counts)))
        counts.append(tokens - sum(counts))
        lengths.append(0)
        rows.append([])
    sent = upload(torch.cat(parts, dim=1), torch.int64, device)
    count, width = len(counts), max(1, *(-(-length // size) for length in lengths))
    tables = [(row + [0] * width)[:width] for row in rows]
    small = upload([*lengths, 0, *itertools.accumulate(counts), *itertools.chain.from_iterable(tables)], torch.int32, device)
    table = small[2 * count + 1 :].view(count, width)
    return sent[0], sent[1], PagedAttention(cache, sent[2], table, small[:count], small[count : 2 * count + 1], max(counts), way)
