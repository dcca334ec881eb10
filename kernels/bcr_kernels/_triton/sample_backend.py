"""Launches the kernel of `linear_sample`: `sample_reference.sample` for tensors on CUDA (or under the interpreter)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from bcr_kernels._triton import sample_kernels, tiles
from bcr_kernels._triton.backend import FORWARD_ROWS, LOG2E, launch_tiles, readable, row_statistics
from bcr_kernels.reference import spans


def sample(
    hidden: Tensor, weight: Tensor, keys: Tensor, inv_temperature: Tensor, noisy: Tensor | None, with_logprob: bool
) -> tuple[Tensor, Tensor | None]:
    """See `sample_reference.sample`. The log-prob is a second pass over the weight, by the learner's own kernels."""
    hidden, weight = readable(hidden), readable(weight)
    token = torch.empty_like(keys)
    tile = tiles.sample_tile_for(hidden)
    for chunk in spans(hidden.shape[0], FORWARD_ROWS):
        scale = inv_temperature[chunk] * LOG2E
        best = scale.new_empty((triton.cdiv(weight.shape[0], tile.cols), scale.shape[0]))
        first = torch.empty_like(best, dtype=torch.int32)
        of_chunk = None if noisy is None else noisy[chunk]
        of_tiles = keys[chunk].contiguous(), scale, of_chunk, best, first
        launch_tiles(sample_kernels.sample_kernel, tile, hidden[chunk], weight, *of_tiles)
        candidates = torch.where(best == best.amax(0), first, torch.iinfo(torch.int32).max)
        token[chunk] = candidates.amin(0)
    return token, row_statistics(hidden, weight, token, inv_temperature, False).logprob if with_logprob else None
