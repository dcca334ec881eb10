"""Liger's Triton kernels in the decoder's shapes. Imported only where `bcr.model.ops` has chosen them."""

from __future__ import annotations

from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x[..., H]. The backward leaves the incoming gradient alone: the residual stream has other uses for it."""
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def swiglu(gate_up: Tensor) -> Tensor:
    """[T,2I] -> [T,I]. Not in place: what the backward reads may be kept for longer than one backward."""
    return LigerFusedGateUpSiLUMulFunction.apply(gate_up, False)


def rotate(query: Tensor, key: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """query[T,Q,D], key[T,K,D]; cos, sin [T,1,D] of `Rotary`.

    The kernel wants [1, heads, T, D], reads one half of cos and sin, and makes the signs itself: the right half, which has none. It writes
    into its input where that is contiguous.
    """
    cos, sin = (half.transpose(0, 1) for half in rotation)  # [1,T,D]
    query, key, *_ = LigerRopeFunction.apply(query[None].transpose(1, 2), key[None].transpose(1, 2), cos, sin[..., sin.shape[-1] // 2 :])
    return query.transpose(1, 2)[0], key.transpose(1, 2)[0]
