"""Rotary position embeddings (RoFormer, NeoX layout) and the ways to stretch them: linear, llama3 and YaRN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LLAMA3 = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
YARN = ("original_max_position_embeddings",)
NEEDED = {"linear": (), "llama3": LLAMA3, "yarn": YARN}  # rope_type: what it needs beside `factor`
OPTIONAL = {"linear": (), "llama3": (), "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")}


@dataclass(frozen=True)
class RopeScaling:
    """How the rotation frequencies are stretched; fields as in Hugging Face's `rope_parameters`, None where unused or at their default.

    linear: all of them divided by `factor`. llama3: only those whose wavelength is long (Llama 3.1). yarn: by parts, and the rotated
    vectors scaled (arXiv 2309.00071). Raises ValueError naming the field.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in NEEDED:
            raise ValueError(f"RoPE scaling {self.rope_type!r} is not supported; supported are {', '.join(NEEDED)}.")
        for name in ("factor", *NEEDED[self.rope_type]):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"RoPE scaling {self.rope_type!r} has {name} = {value!r}; it must be a positive number.")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:  # type: ignore[operator]
            raise ValueError(
                f"RoPE scaling 'llama3' has low_freq_factor = {self.low_freq_factor}, which must be below "
                f"high_freq_factor = {self.high_freq_factor}."
            )

    @staticmethod
    def read(rope: dict[str, Any], context: int) -> RopeScaling | None:
        """From `rope_parameters` or the older `rope_scaling`; None for plain RoPE. `context` stands in for a missing original one."""
        kind = rope.get("rope_type", rope.get("type", "default"))
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; only whole heads can be rotated (1.0).")
        if kind == "default":
            return None
        given = {name: rope[name] for name in ("factor", *NEEDED.get(kind, ()), *OPTIONAL.get(kind, ())) if rope.get(name) is not None}
        if "original_max_position_embeddings" in NEEDED.get(kind, ()):
            given.setdefault("original_max_position_embeddings", context)
        if kind == "yarn":  # DeepSeek's way of writing it
            given.setdefault("factor", context / given["original_max_position_embeddings"])
        return RopeScaling(kind, given.pop("factor", None), **given)

    def fields(self) -> dict[str, Any]:
        """What `read` reads."""
        return {name: value for name, value in vars(self).items() if value is not None}


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Angles per position [D/2], float64, and the factor on the rotated vectors."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    plain = theta**-exponent
    if scaling is None:
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    return (llama3 if scaling.rope_type == "llama3" else yarn)(plain, theta, scaling)


def llama3(plain: Tensor, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Wavelengths above context / low_freq_factor are stretched, those below context / high_freq_factor are kept, between them a ramp."""
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    assert None not in (context, low, high)
    turns = context * plain / (2 * math.pi)  # type: ignore[operator]  # in the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # type: ignore[operator]
    return plain * (kept + (1 - kept) / scaling.factor), 1.0


def yarn(plain: Tensor, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """Pairs that turn over beta_fast times in the original context are kept, under beta_slow times stretched, between them a ramp."""
    assert scaling.original_max_position_embeddings
    size = 2 * len(plain)

    def dimension(turns: float) -> float:
        """The (fractional) pair that turns so often in the original context."""
        return size * math.log(scaling.original_max_position_embeddings / (2 * math.pi * turns)) / (2 * math.log(theta))  # type: ignore[operator]

    low, high = dimension(scaling.beta_fast or 32.0), dimension(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(len(plain), dtype=torch.float64) - low) / (high - low or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return plain * (kept + (1 - kept) / scaling.factor), yarn_magnitude(scaling)


def yarn_magnitude(scaling: RopeScaling) -> float:
    """YaRN's attention temperature as a factor on queries and keys each: 0.1 ln(factor) + 1 unless the config says otherwise."""

    def magnitude(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)


class Rotary(nn.Module):
    """cos and sin [T,1,D], float32, of the angles position * frequency, the two halves of D rotated against each other.

    The sine of the left half carries the minus sign of the rotation.
    """

    def __init__(self, head_dim: int, theta: float, positions: int, scaling: RopeScaling | None) -> None:
        super().__init__()
        self.head_dim, self.theta, self.positions, self.scaling = head_dim, theta, positions, scaling
        self.table: tuple[Tensor, Tensor] | None = None  # made at first use, on the device of the positions

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.table is None or self.table[0].device != position_ids.device:
            frequency, magnitude = frequencies(self.head_dim, self.theta, self.scaling)
            angles = torch.outer(torch.arange(self.positions, dtype=torch.float64), frequency)
            cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
            both = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
            self.table = tuple(half[:, None, :].float().to(position_ids.device) for half in both)  # type: ignore[assignment]
            assert self.table is not None
        cos, sin = self.table
        return cos[position_ids], sin[position_ids]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x[T,heads,D] by the angles of its tokens."""
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([right, left], dim=-1) * sin).to(x.dtype)
