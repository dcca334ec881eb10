"""Causal attention over packed sequences, by the implementation that `bcr.model.ops` chooses.

FlashAttention (flash-attn's or torch's) takes the sequences end to end as they lie. `scaled_dot_product_attention` takes padded batches,
sequences of like length together, so that little is padded.
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

MAX_PADDING = 1.25  # a bucket ends where its longest sequence is more than this times its shortest


class PackedAttention:
    """attention(layer, query[T,Q,D], key[T,K,D], value[T,K,D]) -> [T,Q,D]: every token sees itself and what precedes it in its sequence.

    `lengths` are the token counts of the sequences that lie end to end in T. The plan is made once and serves all layers.

    >>> PackedAttention([2, 9, 2], torch.device("cpu")).buckets   # two buckets: the two short ones together, the long one alone
    [([0, 2], 2), ([1], 9)]
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        if min(lengths, default=0) < 1:
            raise ValueError(f"lengths of packed sequences are {list(lengths)}; every one must be at least 1.")
        self.lengths, self.device = list(lengths), device

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        way = implementations(query.device.type, query.dtype, query.shape[-1]).attention
        if way == "torch sdpa":
            if query.device.type == "cpu":  # float32 inside, as in the sampler: torch's kernel rounds the weights to bfloat16
                return self.padded(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))).to(query.dtype)
            return self.padded(query, key, value)
        run = flash_attention if way == "flash-attn" else varlen_attention
        return run(query, key, value, self.boundaries, max(self.lengths))

    @functools.cached_property
    def boundaries(self) -> Tensor:
        """cu_seqlens [R+1], int32."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32).to(self.device, non_blocking=True)

    @functools.cached_property
    def buckets(self) -> list[tuple[list[int], int]]:
        return bucket_by_length(self.lengths)

    @functools.cached_property
    def plans(self) -> list[tuple[Tensor, Tensor | None]]:
        return [padded_places(self.lengths, rows, longest, self.device) for rows, longest in self.buckets]

    @functools.cached_property
    def back(self) -> Tensor | None:
        """From bucket order to packing order; None where they are the same."""
        held = torch.cat([ids.flatten() if kept is None else ids.flatten()[kept] for ids, kept in self.plans])
        in_order = all(rows == sorted(rows) for rows, _ in self.buckets) and len(self.buckets) == 1
        return None if in_order else torch.argsort(held)

    def padded(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        pieces = []
        for ids, kept in self.plans:
            q, k, v = (x[ids].transpose(1, 2) for x in (query, key, value))  # [rows, heads, longest, D]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2).flatten(0, 1)
            pieces.append(out if kept is None else out[kept])
        together = torch.cat(pieces)
        return together if self.back is None else together[self.back]


def flash_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # only where it is installed

    return flash_attn_varlen_func(query, key, value, boundaries, boundaries, longest, longest, causal=True)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # implied in the first versions
        options["enable_gqa"] = True
    return cast(Tensor, varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **options))


def padded_places(lengths: Sequence[int], rows: list[int], longest: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Packed index of every place of the padded batch [rows,longest], and the flat places that are no padding (None: all of them).

    Padding repeats the last token of its row: it stands after every real token, so causal attention never reads it.
    """
    starts = list(itertools.accumulate(lengths, initial=0))
    first = torch.tensor([starts[row] for row in rows], device=device)[:, None]
    length = torch.tensor([lengths[row] for row in rows], device=device)[:, None]
    place = torch.arange(longest, device=device)[None, :]
    ids = first + torch.minimum(place, length - 1)
    full = all(lengths[row] == longest for row in rows)
    return ids, None if full else (place < length).flatten().nonzero().squeeze(1)


def bucket_by_length(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Sequences grouped by length: [(rows, longest length), ...], no row padded by more than MAX_PADDING."""
    buckets: list[tuple[list[int], int]] = []
    shortest = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if buckets and lengths[row] <= MAX_PADDING * shortest:
            buckets[-1] = ([*buckets[-1][0], row], lengths[row])
        else:
            buckets.append(([row], lengths[row]))
            shortest = lengths[row]
    return buckets
