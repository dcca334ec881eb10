"""The feed-forward block: SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn

from bcr.model import ops
from bcr.model.products import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_up_proj(hidden)))
