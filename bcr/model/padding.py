"""Packed sequences as padded batches, sequences of like length together, and back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bcr.model.readers import Readers

MAX_PADDING = 1.25  # a bucket ends where its longest sequence is more than this times its shortest

Bucket = tuple[list[int], int]  # sequences, and the length of the longest


class Layout:
    """Where each token lies in the padded batches. Padding repeats the last token of its row: it stands after every real token, so causal
    attention never reads it, and as its own output is dropped, its gradient is exactly 0."""

    def __init__(self, lengths: Sequence[int], buckets: Sequence[Bucket], device: torch.device) -> None:
        starts = list(itertools.accumulate(lengths, initial=0))
        self.shapes = [(len(rows), longest) for rows, longest in buckets]
        self.tokens: list[Tensor] = []  # for each bucket the token [rows * longest] that stands in each place
        place_of = torch.empty(starts[-1], dtype=torch.int64)
        before = 0
        for rows, longest in buckets:
            tokens, real = own_tokens(rows, longest, starts, lengths)
            places = real.flatten().nonzero().squeeze(1)
            place_of[tokens.flatten()[places]] = before + places
            before += tokens.numel()
            self.tokens.append(tokens.flatten().to(device))
        self.places = place_of.to(device)  # [T]: the place of each token, counted through all buckets

    def take_out(self, batches: Sequence[Tensor]) -> Tensor:
        """The real tokens [T,heads,D] of padded batches [rows,longest,heads,D], in packing order."""
        return end_to_end(batches).index_select(0, self.places)


class LayoutAfterParents:
    """The same for keys and values, which in each row begin with those of the sequence's parent: a parent's tokens stand in many rows."""

    def __init__(self, lengths: Sequence[int], parents: Sequence[int], buckets: Sequence[Bucket], device: torch.device) -> None:
        starts = list(itertools.accumulate(lengths, initial=0))
        self.shapes: list[tuple[int, int]] = []
        self.tokens: list[Tensor] = []
        real_places: list[Tensor] = []
        for rows, longest in buckets:
            tokens, real = own_tokens(rows, longest, starts, lengths)
            if parents[rows[0]] >= 0:  # parents of one length throughout a bucket
                first = torch.tensor([starts[parents[row]] for row in rows])[:, None]
                prompts = first + torch.arange(lengths[parents[rows[0]]])
                tokens, real = torch.cat([prompts, tokens], 1), torch.cat([torch.ones_like(prompts, dtype=torch.bool), real], 1)
            self.shapes.append((len(rows), tokens.shape[1]))
            self.tokens.append(tokens.flatten())
            real_places.append(real.flatten())
        numbers = torch.cat(real_places).nonzero().squeeze(1)
        self.readers = Readers(torch.cat(self.tokens)[numbers], starts[-1], numbers, device)
        self.tokens = [tokens.to(device) for tokens in self.tokens]

    def take_out(self, batches: Sequence[Tensor]) -> Tensor:
        """For each token [T,heads,D] the sum over the places [rows,longest,heads,D] that it stands in."""
        return self.readers.added_up(end_to_end(batches))


def own_tokens(rows: Sequence[int], longest: int, starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which token stands in each place [rows,longest] of a bucket, and whether it is no padding."""
    first = torch.tensor([starts[row] for row in rows])[:, None]
    length = torch.tensor([lengths[row] for row in rows])[:, None]
    column = torch.arange(longest)
    return first + torch.minimum(column, length - 1), column < length


def end_to_end(batches: Sequence[Tensor]) -> Tensor:
    """[rows,longest,heads,D] of each bucket -> all places [N,heads,D]."""
    flat = [batch.reshape(-1, *batch.shape[2:]) for batch in batches]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def bucket_by_length(lengths: Sequence[int], before: Sequence[int] | None = None) -> list[Bucket]:
    """Sequences grouped by length, no row padded by more than MAX_PADDING. With `before` only those meet that have as many tokens before
    them.

    >>> bucket_by_length([2, 9, 2])   # two buckets: the two short ones together, the long one alone
    [([0, 2], 2), ([1], 9)]
    """
    before = before or [0] * len(lengths)
    buckets: list[Bucket] = []
    shortest, met = 0, -1
    for row in sorted(range(len(lengths)), key=lambda row: (before[row], lengths[row])):
        if before[row] == met and lengths[row] <= MAX_PADDING * shortest:
            buckets[-1] = ([*buckets[-1][0], row], lengths[row])
        else:
            buckets.append(([row], lengths[row]))
            shortest, met = lengths[row], before[row]
    return buckets


def pad(x: Tensor, layout: Layout | LayoutAfterParents) -> tuple[Tensor, ...]:
    """x[T,heads,D] -> [rows,longest,heads,D] of each bucket."""
    return _Pad.apply(x, layout)


def unpad(batches: Sequence[Tensor], layout: Layout) -> Tensor:
    """The opposite of `pad`."""
    return _Unpad.apply(layout, *batches)


class _Pad(torch.autograd.Function):
    """Autograd's own backward would add up rows one by one, of which mostly no two are the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout | LayoutAfterParents) -> tuple[Tensor, ...]:
        ctx.layout = layout
        flat = x.flatten(1)
        shapes = ((*shape, *x.shape[1:]) for shape in layout.shapes)
        return tuple(flat.index_select(0, tokens).view(shape) for tokens, shape in zip(layout.tokens, shapes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.layout.take_out(upstream), None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, *batches: Tensor) -> Tensor:
        ctx.layout = layout
        return layout.take_out(batches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        sizes = [rows * longest for rows, longest in ctx.layout.shapes]
        flat = upstream.new_zeros(sum(sizes), *upstream.shape[1:]).flatten(1)
        flat.index_copy_(0, ctx.layout.places, upstream.flatten(1))
        shapes = ((*shape, *upstream.shape[1:]) for shape in ctx.layout.shapes)
        return None, *(part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))
