"""Which rows of a pack enter the matrix products, and on which backend.

Tokens without a gradient are left out before the first product (compaction): the cost of the head is that of its active tokens.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from bcr_kernels._checks import check_count, require
from bcr_kernels._matmul import compute_dtype

Backend = Literal["auto", "triton", "reference"]


def active_rows(mask: Tensor, count: int | None) -> Tensor | None:
    """rows[N] int64 where mask[T] is true, in order; None where every row is.

    With `count` (their number, known to the caller) the device is not waited for. Without it, on CUDA, this is the one wait of a call.
    """
    check_count("active_tokens", count, mask)
    if count is not None:
        return None if count == mask.shape[0] else torch.nonzero_static(mask, size=count, fill_value=0).squeeze(1)
    rows = mask.nonzero().squeeze(1)
    return None if rows.shape[0] == mask.shape[0] else rows


def take(vector: Tensor, rows: Tensor | None) -> Tensor:
    """The active rows; the tensor itself where all are."""
    return vector if rows is None else vector.index_select(0, rows)


def put(compact: Tensor, rows: Tensor | None, length: int) -> Tensor:
    """The active rows back among `length`, zeros elsewhere."""
    if rows is None:
        return compact
    return compact.new_zeros((length, *compact.shape[1:])).index_copy_(0, rows, compact)


def inverse_temperature(temperature: float | Tensor, hidden: Tensor, rows: Tensor | None) -> Tensor:
    """1 / temperature of the active rows, [N] in the compute dtype."""
    dtype = compute_dtype(hidden)
    if isinstance(temperature, Tensor):
        return take(temperature.to(dtype), rows).reciprocal()
    count = hidden.shape[0] if rows is None else rows.shape[0]
    return torch.full((count,), 1 / temperature, dtype=dtype, device=hidden.device)


def choose_backend(
    backend: Backend, hidden: Tensor, *, name: str = "hidden", float32_on_triton: bool = False
) -> Literal["triton", "reference"]:
    """ "auto": Triton kernels for bfloat16 on CUDA, PyTorch otherwise (the head's float32 on CUDA is fastest through cuBLAS).

    `name` is what the caller calls `hidden`.
    """
    require(backend in ("auto", "triton", "reference"), "backend", f"must be 'auto', 'triton' or 'reference', got {backend!r}")
    if backend == "auto":
        on_cuda = hidden.is_cuda and (hidden.dtype == torch.bfloat16 or (float32_on_triton and hidden.dtype == torch.float32))
        return "triton" if on_cuda and importlib.util.find_spec("triton") is not None else "reference"
    if backend == "triton":
        require(importlib.util.find_spec("triton") is not None, "backend", "is 'triton', but triton is not installed")
        require(hidden.dtype != torch.float64, "backend", "'triton' takes bfloat16 and float32; float64 runs on 'reference'")
        from bcr_kernels._triton import INTERPRETED

        require(hidden.is_cuda or INTERPRETED, "backend", f"is 'triton', which needs CUDA, but {name} is on {hidden.device}")
    return backend
