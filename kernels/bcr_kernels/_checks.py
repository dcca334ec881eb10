"""Argument checks: a bad argument gets a ValueError that begins with its name.

Checks of shape, dtype and device are free and always run. Checks of values (targets in range, finite temperature) read the
tensor: they run on a CPU, and on CUDA only in debug mode, because there they would make the host wait for the device.
"""

from __future__ import annotations

import math
import os
import sys
from typing import TypeGuard

import torch
from torch import Tensor

IGNORED = -100  # a target that costs nothing and counts for nothing
FLOATS = (torch.bfloat16, torch.float32, torch.float64)

_debug = os.environ.get("BCR_KERNELS_DEBUG") == "1"


def set_debug(enabled: bool) -> None:
    """Turn value checks on CUDA tensors on or off; `BCR_KERNELS_DEBUG=1` turns them on at import. Each check waits for the device."""
    global _debug
    _debug = enabled


def values_are_checked(tensor: Tensor) -> bool:
    return _debug or tensor.device.type == "cpu"


def require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {message}")


def describe(tensor: object) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor) -> None:
    """hidden[T, H], weight[V, H] of one dtype and device, targets[T] integer, temperature a positive number or float [T]."""
    check_head_weight(hidden, weight)
    check_vector("targets", targets, hidden, integer=True)
    if values_are_checked(targets):
        bad = (targets != IGNORED) & ((targets < 0) | (targets >= weight.shape[0]))
        if bool(bad.any()):
            where = int(bad.nonzero()[0])
            message = f"must be {IGNORED} or in [0, {weight.shape[0]}), got {int(targets[where])} at token {where}"
            raise ValueError(f"targets: {message}")
    _check_temperature(temperature, hidden)


def check_head_weight(hidden: Tensor, weight: Tensor) -> None:
    """hidden[T, H] and weight[V, H] of one dtype and device."""
    require(isinstance(hidden, Tensor) and hidden.ndim == 2, "hidden", f"must be a tensor [T, H], got {describe(hidden)}")
    require(isinstance(weight, Tensor) and weight.ndim == 2, "weight", f"must be a tensor [V, H], got {describe(weight)}")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        require(not is_dtensor(tensor), name, "is a DTensor; pass a whole tensor (`.full_tensor()`, or call inside the module's forward)")
        require(
            tensor.dtype in FLOATS,
            name,
            f"must be bfloat16, float32 or float64, got {tensor.dtype} (the exponents of float16 are too few for kept exponentials)",
        )
    require(weight.dtype == hidden.dtype, "weight", f"must have the dtype of hidden, {hidden.dtype}, got {weight.dtype}; cast one of them")
    require(weight.shape[0] > 0, "weight", "needs at least one vocabulary row")
    require(
        weight.shape[1] == hidden.shape[1],
        "weight",
        f"must be [V, {hidden.shape[1]}] like hidden[T, {hidden.shape[1]}], got {describe(weight)}",
    )
    require(weight.device == hidden.device, "weight", f"must be on {hidden.device} like hidden, got {weight.device}")


def _check_temperature(temperature: float | Tensor, hidden: Tensor) -> None:
    if not isinstance(temperature, Tensor):
        require(
            is_number(temperature) and temperature > 0,
            "temperature",
            f"must be a positive finite number or a tensor [T], got {temperature!r}",
        )
        return
    check_vector("temperature", temperature, hidden)
    require(not temperature.requires_grad, "temperature", "is a constant of the loss; pass temperature.detach()")
    if values_are_checked(temperature):
        require(bool((torch.isfinite(temperature) & (temperature > 0)).all()), "temperature", "must be positive and finite for every token")


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, float | int) and math.isfinite(value)


def check_vector(name: str, vector: Tensor, like: Tensor, *, integer: bool = False, length: int | None = None) -> None:
    """A vector [length], by default one entry per row of `like`, on the device of `like`."""
    expected = like.shape[0] if length is None else length
    kind = "an integer" if integer else "a floating-point"
    require(isinstance(vector, Tensor) and not is_dtensor(vector), name, f"must be {kind} tensor [{expected}], got {describe(vector)}")
    right_kind = vector.dtype in (torch.int64, torch.int32) if integer else vector.dtype in FLOATS
    wanted = "int64 or int32" if integer else "bfloat16, float32 or float64"
    require(right_kind, name, f"must be {wanted}, got {vector.dtype}")
    require(vector.shape == (expected,), name, f"must be [{expected}], got {list(vector.shape)}")
    require(vector.device == like.device, name, f"must be on {like.device} like the rest, got {vector.device}")


def check_count(name: str, count: int | None, mask: Tensor) -> None:
    """`count` is None or the number of true entries of mask[T]."""
    if count is None:
        return
    require(isinstance(count, int) and 0 <= count <= mask.shape[0], name, f"must be an int in [0, {mask.shape[0]}], got {count!r}")
    if values_are_checked(mask):
        actual = int(mask.sum())
        require(count == actual, name, f"is {count}, but {actual} tokens are active")


def is_dtensor(tensor: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: no DTensor can exist
    return module is not None and isinstance(tensor, module.DTensor)
