"""Segments of a pack: from boundaries to ids, counts and per-token weights, on the device and without a loop over sequences.

A pack is one row of T tokens that holds several sequences end to end. A *segment* is a span of tokens that shares one advantage
(one problem of a rollout). `segment_ids[t]` is the segment of token t, or -1 for none (prompt, padding).

Below, one pack of T = 8 tokens holds two sequences, tokens 0-4 and 5-7. In the first, token 0 is the prompt, tokens 1-2 answer one
problem and tokens 3-4 another; in the second, token 5 is the prompt and tokens 6-7 answer a third:

    >>> import torch
    >>> starts, stops = torch.tensor([1, 3, 6]), torch.tensor([3, 5, 8])
    >>> segment_ids = segment_ids_from_boundaries(starts, stops, num_tokens=8)
    >>> segment_ids.tolist()
    [-1, 0, 0, 1, 1, -1, 2, 2]
    >>> segment_counts(segment_ids, num_segments=3).tolist()
    [2, 2, 2]
    >>> sequence_ids = sequence_ids_from_cu_seqlens(torch.tensor([0, 5, 8]), num_tokens=8)
    >>> sequence_ids.tolist()
    [0, 0, 0, 0, 0, 1, 1, 1]

The *weights* turn per-token losses into the aggregated loss: `(weights * token_loss).sum()`, summed over packs and ranks. Their
denominators are those of the whole optimizer step (all packs, all ranks), so that no split into packs changes the gradient; pass
them as numbers or as 0-d tensors on the device. Weights are 0 where `segment_ids` is -1.

    >>> token_mean_weights(segment_ids, total_tokens=6).tolist()[:3]  # 1/6 each
    [0.0, 0.1666666716337204, 0.1666666716337204]
    >>> sequence_mean_token_mean_weights(segment_ids, sequence_ids, num_sequences=2, total_sequences=2).tolist()  # 1/(2*4), 1/(2*2)
    [0.0, 0.125, 0.125, 0.125, 0.125, 0.0, 0.25, 0.25]
    >>> sequence_mean_token_sum_weights(segment_ids, total_sequences=2, norm_length=4).tolist()  # 1/(2*4)
    [0.0, 0.125, 0.125, 0.125, 0.125, 0.0, 0.125, 0.125]
    >>> problem_mean_weights(segment_ids, num_segments=4, total_problems=4).tolist()  # the fourth problem was never reached: 1/(4*2)
    [0.0, 0.125, 0.125, 0.125, 0.125, 0.0, 0.125, 0.125]
"""

from __future__ import annotations

import torch
from torch import Tensor

from bcr_kernels._checks import require, values_are_checked

Number = float | int | Tensor  # a Python number, or a 0-d tensor on the device


def segment_ids_from_boundaries(starts: Tensor, stops: Tensor, num_tokens: int) -> Tensor:
    """ids[num_tokens] int64: i where starts[i] <= t < stops[i], -1 elsewhere.

    starts[S], stops[S]: int64 positions in the pack, 0 <= start <= stop <= num_tokens. Segments do not overlap; they may be empty and
    in any order. Raises ValueError (on a CPU, or in debug mode) for positions outside the pack and for overlaps.
    """
    require(starts.ndim == 1 and starts.dtype == torch.int64, "starts", f"must be int64 [S], got {starts.dtype} {list(starts.shape)}")
    require(stops.shape == starts.shape and stops.dtype == torch.int64, "stops", f"must be int64 {list(starts.shape)} like starts")
    if values_are_checked(starts):
        _check_boundaries(starts, stops, num_tokens)
    # Opening segment i adds i + 1 from `start` on, closing it takes i + 1 away again: the running sum is the id plus one.
    labels = torch.arange(1, starts.shape[0] + 1, device=starts.device)
    steps = torch.zeros(num_tokens + 1, dtype=torch.int64, device=starts.device)
    steps.scatter_add_(0, starts, labels).scatter_add_(0, stops, -labels)
    return steps.cumsum(0)[:num_tokens] - 1


def _check_boundaries(starts: Tensor, stops: Tensor, num_tokens: int) -> None:
    require(bool((starts >= 0).all()), "starts", "must not be negative")
    require(bool((stops >= starts).all()), "stops", "must not lie before starts")
    require(bool((stops <= num_tokens).all()), "stops", f"must not exceed num_tokens = {num_tokens}")
    filled = stops > starts
    order = starts[filled].argsort()
    ahead, behind = starts[filled][order][1:], stops[filled][order][:-1]
    require(bool((ahead >= behind).all()), "starts", "segments overlap")


def sequence_ids_from_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """ids[num_tokens] int64: the sequence of each token; R for tokens after the last sequence.

    cu_seqlens[R + 1] int64 or int32: 0, then the end of each sequence.
    """
    require(cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 1, "cu_seqlens", f"must be [R + 1], got {list(cu_seqlens.shape)}")
    positions = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True) - 1


def segment_counts(segment_ids: Tensor, num_segments: int) -> Tensor:
    """counts[num_segments] int64: tokens of each segment; 0 for a segment that has none."""
    return _counts(segment_ids, segment_ids >= 0, num_segments)


def token_mean_weights(segment_ids: Tensor, total_tokens: Number, dtype: torch.dtype = torch.float32) -> Tensor:
    """weights[T]: every token of every segment counts the same (DAPO). `total_tokens`: tokens in segments, over the whole step."""
    return (segment_ids >= 0).to(dtype) / total_tokens


def sequence_mean_token_mean_weights(
    segment_ids: Tensor, sequence_ids: Tensor, num_sequences: int, total_sequences: Number, dtype: torch.dtype = torch.float32
) -> Tensor:
    """weights[T]: the mean over its tokens for each sequence, then the mean over sequences (GRPO).

    `num_sequences` in this pack (the length of the table of counts), `total_sequences` over the whole step.
    """
    inside = segment_ids >= 0
    lengths = _counts(sequence_ids, inside, num_sequences)
    return _divide(inside, lengths, sequence_ids, total_sequences, dtype)


def sequence_mean_token_sum_weights(
    segment_ids: Tensor, total_sequences: Number, norm_length: Number, dtype: torch.dtype = torch.float32
) -> Tensor:
    """weights[T]: the sum over tokens divided by one constant length, then the mean over sequences (Dr.GRPO)."""
    return (segment_ids >= 0).to(dtype) / (total_sequences * norm_length)


def problem_mean_weights(segment_ids: Tensor, num_segments: int, total_problems: Number, dtype: torch.dtype = torch.float32) -> Tensor:
    """weights[T]: the mean over its tokens for each problem, then the mean over problems.

    `num_segments` in this pack (the length of the table of counts); `total_problems` over the whole step, problems without tokens included.
    """
    inside = segment_ids >= 0
    return _divide(inside, segment_counts(segment_ids, num_segments), segment_ids, total_problems, dtype)


def _counts(ids: Tensor, inside: Tensor, size: int) -> Tensor:
    """How often each id occurs among the tokens that are `inside`. Integers, so the order of the additions does not matter."""
    require(ids.ndim == 1 and ids.dtype == torch.int64, "ids", f"must be int64 [T], got {ids.dtype} {list(ids.shape)}")
    if values_are_checked(ids):
        require(not bool((inside & (ids >= size)).any()), "ids", f"must be below {size}, the length of the table of counts")
    table = torch.zeros(size + 1, dtype=torch.int64, device=ids.device)
    slot = torch.where(inside, ids, size)
    return table.scatter_add_(0, slot, torch.ones_like(slot))[:size]


def _divide(inside: Tensor, lengths: Tensor, ids: Tensor, total: Number, dtype: torch.dtype) -> Tensor:
    """inside / (lengths[ids] * total), and 0 outside."""
    if lengths.shape[0] == 0:
        return inside.to(dtype)
    per_token = lengths[ids.clamp(0, lengths.shape[0] - 1)].clamp(min=1).to(dtype)
    return inside.to(dtype) / (per_token * total)
