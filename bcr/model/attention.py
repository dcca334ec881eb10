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
from torch.autograd.function import once_differentiable

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
    def layout(self) -> Layout:
        return Layout(self.lengths, self.buckets, self.device)

    def padded(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        batches = zip(*(_Pad.apply(x, self.layout) for x in (query, key, value)), strict=True)  # [rows,longest,heads,D] of each bucket
        heads_first = ((x.transpose(1, 2) for x in batch) for batch in batches)
        pieces = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped) for q, k, v in heads_first]
        return _Unpad.apply(self.layout, *(piece.transpose(1, 2) for piece in pieces))


class Layout:
    """Where each token lies in the padded batches. Padding repeats the last token of its row: it stands after every real token, so causal
    attention never reads it, and as its own output is dropped, its gradient is exactly 0."""

    def __init__(self, lengths: Sequence[int], buckets: list[tuple[list[int], int]], device: torch.device) -> None:
        starts = list(itertools.accumulate(lengths, initial=0))
        self.shapes = [(len(rows), longest) for rows, longest in buckets]
        self.tokens: list[Tensor] = []  # for each bucket the token [rows * longest] that stands in each place
        place_of = torch.empty(starts[-1], dtype=torch.int64)
        before = 0
        for rows, longest in buckets:
            first = torch.tensor([starts[row] for row in rows])[:, None]
            length = torch.tensor([lengths[row] for row in rows])[:, None]
            column = torch.arange(longest)
            tokens = (first + torch.minimum(column, length - 1)).flatten()
            real = (column < length).flatten().nonzero().squeeze(1)
            place_of[tokens[real]] = before + real
            before += len(tokens)
            self.tokens.append(tokens.to(device))
        self.places = place_of.to(device)  # [T]: the place of each token, counted through all buckets


class _Pad(torch.autograd.Function):
    """x[T,heads,D] -> [rows,longest,heads,D] of each bucket. Autograd's own backward would add up rows of which no two are the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        ctx.layout = layout
        flat = x.flatten(1)
        shapes = ((*shape, *x.shape[1:]) for shape in layout.shapes)
        return tuple(flat.index_select(0, tokens).view(shape) for tokens, shape in zip(layout.tokens, shapes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return take_out(upstream, ctx.layout), None


class _Unpad(torch.autograd.Function):
    """The opposite of `_Pad`."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, *batches: Tensor) -> Tensor:
        ctx.layout = layout
        return take_out(batches, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        sizes = [rows * longest for rows, longest in ctx.layout.shapes]
        flat = upstream.new_zeros(sum(sizes), *upstream.shape[1:]).flatten(1)
        flat.index_copy_(0, ctx.layout.places, upstream.flatten(1))
        shapes = ((*shape, *upstream.shape[1:]) for shape in ctx.layout.shapes)
        return None, *(part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))


def take_out(batches: Sequence[Tensor], layout: Layout) -> Tensor:
    """The real tokens [T,heads,D] of padded batches [rows,longest,heads,D], in packing order."""
    heads = batches[0].shape[2:]
    flat = [batch.reshape(-1, heads.numel()) for batch in batches]
    together = flat[0] if len(flat) == 1 else torch.cat(flat)
    return together.index_select(0, layout.places).view(-1, *heads)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # only where it is installed

    return flash_attn_varlen_func(query, key, value, boundaries, boundaries, longest, longest, causal=True)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # implied in the first versions
        options["enable_gqa"] = True
    return cast(Tensor, varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **options))


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
