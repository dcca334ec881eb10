"""Products of a few rows with a weight, turned round where that is faster and changes no bit.

A product of 16 to 128 rows with more outputs than inputs runs at half of a large one's rate on a CPU: the library cuts the outputs as
if they were the long side. Asked for the transposed product, weight times rows, it takes 0.6 to 0.9 of the time and sums each element in
the same order. The result is a view with strides (1, R), which elementwise work and the next product take as it is; where it would have to
be copied into rows first (before the norms of queries and keys) nothing is gained, so only the feed-forward block and the head come here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcr.model.activation import lies_across

ROWS, MOST_ROWS = 16, 128  # a multiple of ROWS, as the sampler fills its batches up; beyond MOST_ROWS nothing is gained

_agreed: dict[tuple[object, ...], bool] = {}  # for each kind of product: does this machine give both ways the same bits?


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[R,I], weight[O,I], bias[O] -> [R,O], the bits of `F.linear`; the layout may be the transposed one."""
    if not (x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 2) or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    pays = weight.shape[0] > weight.shape[1] or lies_across(x)
    if pays and x.shape[0] % ROWS == 0 and 0 < x.shape[0] <= MOST_ROWS and _agree(weight, bias):
        return turned(x, weight, bias)
    return F.linear(x, weight, bias)


def turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return (torch.mm(weight, x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())).t()


def _agree(weight: Tensor, bias: Tensor | None) -> bool:
    """Asked once for each shape and thread count, of the weight that comes first."""
    kind = (weight.shape, bias is None, torch.get_num_threads())
    if kind not in _agreed:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(MOST_ROWS, weight.shape[1], generator=generator)
        few = (x[:rows] for rows in (ROWS, 3 * ROWS, MOST_ROWS))
        _agreed[kind] = all(torch.equal(turned(rows, weight, bias), F.linear(rows, weight, bias)) for rows in few)
    return _agreed[kind]
