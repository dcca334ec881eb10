"""SiLU with the same bits for an element wherever it stands in its tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GRAIN, UNIT = 32768, 32  # torch gives a thread at least GRAIN elements; its vector loop takes up to UNIT at once


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) of x[T,I].

    On a CPU torch cuts the elements evenly among threads and computes what is left of a part after whole vectors by scalar code, which
    gives other last bits. Where a cut would fall inside a vector, pieces are taken that one thread computes: of rows, or of the one
    stretch of whole vectors that a transposed x is (see `lies_across`).
    """
    across = lies_across(x)
    parts = min(torch.get_num_threads(), -(-x.numel() // GRAIN))
    if x.is_cuda or parts <= 1 or -(-x.numel() // parts) % UNIT == 0:
        return F.silu(x)
    if across:
        return torch.cat([F.silu(piece) for piece in x.t().flatten().split(GRAIN)]).view(x.t().shape).t()
    return torch.cat([F.silu(piece) for piece in x.split(max(1, GRAIN // x.shape[1]))])


def lies_across(x: Tensor) -> bool:
    """Whether x[T,I] is the transposed view of a contiguous tensor (`bcr.model.products` makes them)."""
    return x.stride() == (1, x.shape[0]) and x.shape[0] > 1
