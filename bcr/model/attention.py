"""Causal attention over packed sequences, by the implementation that `bcr.model.ops` chooses.

FlashAttention (flash-attn's or torch's) takes the sequences end to end as they lie. `scaled_dot_product_attention` takes padded batches,
sequences of like length together, so that little is padded.

Several sequences may go on from one *parent*: a prompt that lies in the pack once, and its completions. Each attends to its parent's keys
and values and to its own; everything else in the model then meets the prompt once (cf. Prefix Grouper, arXiv 2506.05433).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bcr.model.ops import implementations
from bcr.model.padding import Layout, LayoutAfterParents, bucket_by_length, pad, unpad
from bcr.model.readers import Readers, read

TILE = 128  # queries after a parent that read keys together: few keys are read for nothing, and the mask is small for any length


class PackedAttention:
    """attention(layer, query[T,Q,D], key[T,K,D], value[T,K,D]) -> [T,Q,D]: every token sees itself, what precedes it in its sequence, and
    the whole parent of its sequence.

    `lengths` are the token counts of the sequences that lie end to end in T. `parents` has for each the number of its parent, or -1; a
    parent has none itself. The plan is made once and serves all layers.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, parents: Sequence[int] | None = None) -> None:
        if min(lengths, default=0) < 1:
            raise ValueError(f"lengths of packed sequences are {list(lengths)}; every one must be at least 1.")
        self.lengths, self.device = list(lengths), device
        self.parents = [-1] * len(lengths) if parents is None else list(parents)
        assert len(self.parents) == len(lengths)
        assert all(parent < 0 or self.parents[parent] < 0 for parent in self.parents)
        self.shared = any(parent >= 0 for parent in self.parents)
        self.before = [self.lengths[parent] if parent >= 0 else 0 for parent in self.parents]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        way = implementations(query.device.type, query.dtype, query.shape[-1]).attention
        if way == "torch sdpa":
            if query.device.type == "cpu":  # float32 inside, as in the sampler: torch's kernel rounds the weights to bfloat16
                return self.padded(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))).to(query.dtype)
            return self.padded(query, key, value)
        run = flash_attention if way == "flash-attn" else varlen_attention
        return self.end_to_end(run, query, key, value)

    # ---- end to end -----------------------------------------------------------------------------------------------------------

    def end_to_end(self, run: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """By `run(query, key, value, cu_q, cu_k, longest_q, longest_k)`, whose causal mask ends at the last query and the last key."""
        longest = max(self.lengths)
        if not self.shared:
            return run(query, key, value, self.boundaries, self.boundaries, longest, longest)
        rows, readers, boundaries, longest_key = self.keys
        return run(query, read(key, rows, readers), read(value, rows, readers), self.boundaries, boundaries, longest, longest_key)

    @functools.cached_property
    def boundaries(self) -> Tensor:
        """cu_seqlens [R+1], int32."""
        return self.on_device(cumulative(self.lengths))

    @functools.cached_property
    def keys(self) -> tuple[Tensor, Readers, Tensor, int]:
        """The tokens whose keys and values the sequences read, parents first; their readers; cu_seqlens and the longest of them."""
        starts = list(itertools.accumulate(self.lengths, initial=0))
        lengths = [before + own for before, own in zip(self.before, self.lengths, strict=True)]
        parts = list[Tensor]()
        for row, parent in enumerate(self.parents):
            parts += [torch.arange(starts[one], starts[one + 1]) for one in (parent, row) if one >= 0]
        rows = torch.cat(parts)
        return self.on_device(rows), Readers(rows, starts[-1], device=self.device), self.on_device(cumulative(lengths)), max(lengths)

    def on_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    # ---- in padded batches ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def layouts(self) -> tuple[Layout, Layout | LayoutAfterParents, list[int]]:
        """Of queries, of keys and values; and of each bucket how many tokens its rows have before them."""
        buckets = bucket_by_length(self.lengths, self.before)
        queries = Layout(self.lengths, buckets, self.device)
        keys = LayoutAfterParents(self.lengths, self.parents, buckets, self.device) if self.shared else queries
        return queries, keys, [self.before[rows[0]] for rows, _ in buckets]

    def padded(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries, keys, before = self.layouts
        batches = zip(pad(query, queries), pad(key, keys), pad(value, keys), strict=True)  # [rows,longest,heads,D] of each bucket
        heads_first = ((q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)) for q, k, v in batches)
        return unpad([attend(q, k, v, first).transpose(1, 2) for (q, k, v), first in zip(heads_first, before, strict=True)], queries)


def attend(query: Tensor, key: Tensor, value: Tensor, before: int) -> Tensor:
    """query[B,Q,M,D] of the last M places over key[B,K,before+M,D], value[B,K,before+M,D]: each sees what precedes it, and itself."""
    grouped, length = query.shape[1] != key.shape[1], query.shape[2]
    if before == 0:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    tile = -(-length // -(-length // TILE))
    width = before + length + tile
    mask = query.new_zeros(tile, width)  # of a tile after all the keys it may need; `is_causal` would begin at the first key instead
    mask[:, width - tile :].masked_fill_(mask.new_ones(tile, tile, dtype=torch.bool).triu(1), float("-inf"))
    parts = []
    for first in range(0, length, tile):
        stop = min(first + tile, length)
        keys, ends = before + stop, width - tile + stop - first
        views, bias = (query[:, :, first:stop], key[:, :, :keys], value[:, :, :keys]), mask[: stop - first, ends - keys : ends]
        if query.is_cuda:  # torch's memory-efficient kernel loads several numbers at a time, so the mask must not begin just anywhere
            bias = bias.clone(memory_format=torch.contiguous_format)
        parts.append(F.scaled_dot_product_attention(*views, attn_mask=bias, enable_gqa=grouped))
    return torch.cat(parts, 2)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, key_boundaries: Tensor, longest: int, longest_key: int
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # only where it is installed

    return flash_attn_varlen_func(query, key, value, boundaries, key_boundaries, longest, longest_key, causal=True)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, key_boundaries: Tensor, longest: int, longest_key: int
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # implied in the first versions
        options["enable_gqa"] = True
    return cast(Tensor, varlen_attn(query, key, value, boundaries, key_boundaries, longest, longest_key, **options))


def cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
