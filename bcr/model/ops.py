"""Which implementation each operation of the decoder uses: the one place that decides.

On CUDA RMSNorm, SwiGLU and RoPE come from Liger, attention from FlashAttention where it is installed, else from torch's varlen attention;
everywhere else, and for what those cannot do, from torch. The sampler's attention on CUDA is `bcr_kernels`' where Triton is: its rows do
not depend on the batch, and nothing measured says that another is faster; else flash-attn's, or torch's where it takes block tables.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bcr.model.activation import UNIT, lies_across, silu
from bcr.model.rotary import rotate

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Implementations:
    """Names, for people and for the functions below."""

    norm: str  # "liger" | "torch"; so for RMSNorm, SwiGLU and RoPE
    swiglu: str
    rope: str
    attention: str  # "flash-attn" | "torch varlen" | "torch sdpa"
    head: str  # "triton" | "reference": what `bcr_kernels` takes
    decoding: str = "in place"  # the sampler's attention: "bcr_kernels" | "flash-attn" | "torch varlen" | "reference" | "in place" (CPU)

    def __str__(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in vars(self).items())


def choose(device_type: str, dtype: torch.dtype, head_dim: int, available: frozenset[str]) -> Implementations:
    """The choice as a pure function; `available` is a subset of what `available_here` may name."""
    cuda = device_type == "cuda"
    fused = "liger" if cuda and "liger" in available and dtype != torch.float64 else "torch"
    attention = "torch sdpa"
    if cuda and dtype in HALF and head_dim % 8 == 0 and head_dim <= 256 and "ampere" in available:
        attention = next((name for name in ("flash-attn", "torch varlen") if name in available), attention)
    head = "triton" if cuda and "triton" in available and dtype == torch.bfloat16 else "reference"
    return Implementations(fused, fused, fused, attention, head, decoding(cuda, dtype, attention, available))


def decoding(cuda: bool, dtype: torch.dtype, attention: str, available: frozenset[str]) -> str:
    if not cuda:
        return "in place"
    if "triton" in available and "ampere" in available and dtype != torch.float64:
        return "bcr_kernels"
    return attention if attention == "flash-attn" or (attention == "torch varlen" and "block tables" in available) else "reference"


@functools.cache
def available_here() -> frozenset[str]:
    """What this machine offers."""
    packages = {"liger": "liger_kernel", "flash-attn": "flash_attn", "triton": "triton"}
    found = {name for name, package in packages.items() if importlib.util.find_spec(package)}
    if torch.cuda.is_available():
        if torch.backends.cuda.is_flash_attention_available():
            from torch.nn.attention.varlen import varlen_attn

            found |= {"torch varlen"} | ({"block tables"} if "block_table" in inspect.signature(varlen_attn).parameters else set())
        found |= {"ampere"} if torch.cuda.get_device_capability() >= (8, 0) else set()
    return frozenset(found)


@functools.cache
def implementations(device_type: str, dtype: torch.dtype, head_dim: int = 128) -> Implementations:
    return choose(device_type, dtype, head_dim, available_here())


def fused(x: Tensor) -> bool:
    """Whether Liger's kernels take this tensor."""
    return x.is_cuda and implementations("cuda", x.dtype).norm == "liger"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32 (float64 where x is), rounded to x's dtype, times weight."""
    if fused(x):
        from bcr.model import liger

        return liger.rms_norm(x, weight, eps)
    return unweighted_rms_norm(x, eps) * weight


def unweighted_rms_norm(x: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return F.rms_norm(wide, x.shape[-1:], eps=eps).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [T,2I] -> [T,I]; T is 0 for an expert that no token chose."""
    if fused(gate_up) and len(gate_up):
        from bcr.model import liger

        return liger.swiglu(gate_up)
    if lies_across(gate_up) and gate_up.shape[1] % (2 * UNIT):
        gate_up = gate_up.contiguous()  # rows that are no whole vectors have the bits of rows only where they lie as rows
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def query_and_key(
    query_key: Tensor, query_heads: int, norms: tuple[Tensor, Tensor] | None, eps: float, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Q/K norm with the weights `norms` ([D] each; None: without) and RoPE: [T,Q+K,D] -> query[T,Q,D], key[T,K,D].

    `rotation` is `Rotary`'s. In torch both are treated in one go: they differ in the weight alone.
    """
    key_heads = query_key.shape[1] - query_heads
    if fused(query_key):
        from bcr.model import liger

        query, key = query_key.split((query_heads, key_heads), dim=1)
        if norms is not None:
            query, key = liger.rms_norm(query, norms[0], eps), liger.rms_norm(key, norms[1], eps)
        return liger.rotate(query, key, rotation)
    if norms is not None:
        weight = torch.cat([norms[0].expand(query_heads, -1), norms[1].expand(key_heads, -1)])
        query_key = unweighted_rms_norm(query_key, eps) * weight
    query, key = rotate(query_key, rotation).split((query_heads, key_heads), dim=1)
    return query, key
