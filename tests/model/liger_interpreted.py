"""Run as a program under TRITON_INTERPRET=1: Liger's SwiGLU and RoPE, as `bcr.model.liger` calls them, against torch; gradients too."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bcr.model import liger, ops
from bcr.model.rotary import Rotary


def compare(name: str, fused: Callable[..., object], plain: Callable[..., object], inputs: Sequence[Tensor]) -> None:
    found = []
    for function in (fused, plain):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        outputs = list(out) if isinstance(out, tuple) else [out]
        upstream = [torch.randn(output.shape, generator=torch.Generator().manual_seed(1)) for output in outputs]
        found.append((outputs, torch.autograd.grad(outputs, leaves, upstream)))
    for mine, theirs in zip(*found, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    print(name)


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    compare("swiglu", liger.swiglu, ops.swiglu, [torch.randn(7, 48, generator=generator)])
    rotation = Rotary(16, 1e4, 64, None)(torch.tensor([0, 1, 2, 9, 0, 1, 60]))
    query_key = torch.randn(7, 6, 16, generator=generator)

    def fused(x: Tensor) -> tuple[Tensor, Tensor]:  # views of one tensor, as the projection gives them
        query, key = x.split((4, 2), dim=1)
        return liger.rotate(query, key, rotation)

    compare("rope", fused, lambda x: ops.query_and_key(x, 4, None, 1e-6, rotation), [query_key])

    def of_new_tensors(x: Tensor) -> tuple[Tensor, Tensor]:  # contiguous ones, as the norms give them: written in place
        query, key = x.split((4, 2), dim=1)
        return liger.rotate(query * 2, key * 2, rotation)

    compare("rope", of_new_tensors, lambda x: ops.query_and_key(x * 2, 4, None, 1e-6, rotation), [query_key])
    print("agree")
