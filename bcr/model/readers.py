"""Rows of a tensor that several readers read: on the way back, what they say of one row is added up, always in the same order."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Readers:
    """Reader n reads row rows[n] of `count`: int64 [N]. `device`: where to add up, by default where `rows` is.

    Its number among those that tell is n, or numbers[n]: that of padding, to which nobody listens, is in neither.

    >>> Readers(torch.tensor([0, 2, 0]), count=3).added_up(torch.tensor([[1.0], [2.0], [8.0]])).tolist()
    [[9.0], [0.0], [2.0]]
    """

    def __init__(self, rows: Tensor, count: int, numbers: Tensor | None = None, device: torch.device | None = None) -> None:
        ordered, order = rows.sort(stable=True)
        offsets = torch.searchsorted(ordered, torch.arange(count + 1, device=rows.device))
        self.order = (order if numbers is None else numbers[order]).to(device or rows.device)
        self.offsets = offsets.to(device or rows.device)

    def added_up(self, told: Tensor) -> Tensor:
        """told[N,...] -> [count,...]: for each row the sum of what its readers told, 0 where it has none.

        As the bags of an embedding: unlike `index_add`, torch adds those up in a fixed order on CUDA too.
        """
        bags = F.embedding_bag(self.order, told.flatten(1), self.offsets, mode="sum", include_last_offset=True)
        return bags.view(-1, *told.shape[1:])


def read(x: Tensor, rows: Tensor, readers: Readers) -> Tensor:
    """x[T,...] -> x[rows], where `readers` are those of `rows`, int64 [N] on x's device."""
    return _Read.apply(x, rows, readers)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, readers: Readers) -> Tensor:
        ctx.readers = readers
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.readers.added_up(upstream.contiguous()), None, None
