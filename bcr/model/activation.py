"""SiLU with the same bits for an element wherever it stands in its tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GRAIN, UNIT = 32768, 32  # torch gives a thread at least GRAIN elements; its vector loop takes up to UNIT at once


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) of x[T,I].

    On a CPU torch cuts the elements evenly among threads and computes what is left of a part after whole vectors by scalar code, which
    gives other last bits. Where a cut would fall inside a vector, the rows are taken in pieces that one thread computes.
    """
    parts = min(torch.get_num_threads(), -(-x.numel() // GRAIN))
    if x.is_cuda or parts <= 1 or -(-x.numel() // parts) % UNIT == 0:
        return F.silu(x)
    return torch.cat([F.silu(piece) for piece in x.split(max(1, GRAIN // x.shape[1]))])
