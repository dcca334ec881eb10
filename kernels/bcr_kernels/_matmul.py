"""Matrix products with float32 accumulators *and* float32 results, whatever the inputs and the global settings.

`torch.mm` of bfloat16 rounds its result to bfloat16: 8 bits for a logit of 40 is an error of 0.1 nats. And the global TF32 and
reduced-precision switches silently change what a float32 product is. Both are kept out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Inside, autocast is off and float32 products are IEEE float32: no TF32, no bfloat16 substitutes. The user's settings return."""
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cuda.fp32_precision, cpu.fp32_precision
    cuda.fp32_precision = cpu.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays float64 (for tests of the mathematics); everything else computes in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """The tensor in its compute dtype; no copy when it is there already."""
    return tensor.to(compute_dtype(tensor))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a[M, K] @ b[K, N] -> [M, N] in the compute dtype, never rounded to bfloat16. Call inside `exact_float32`."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(wide(a), wide(b))


def matmul_add_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total[M, N] += a[M, K] @ b[K, N], with `total` in the compute dtype. Call inside `exact_float32`."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(wide(a), wide(b))
