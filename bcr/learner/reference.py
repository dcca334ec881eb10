"""The model of the start, towards which a KL term pulls."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from bcr.model import Decoder
from bcr.parallel.sharding import shard


class Reference:
    """`trained`, whole or in shards over `mesh`, as it is when this is made; `whole`: its weights, whole.

    Held is a second copy, or with low-rank adapters a copy of those alone, which take the places of the present ones while they are asked.
    """

    def __init__(self, trained: Decoder, whole: Decoder, mesh: DeviceMesh | None) -> None:
        self.trained, self.copy = trained, None if trained.adapter else frozen_copy(whole, mesh)
        self.adapters = {weight: weight.detach().clone() for weight in trained.parameters() if weight.requires_grad and trained.adapter}

    @contextmanager
    def model(self) -> Iterator[Decoder]:
        """Inside, the decoder that is returned is the reference, for forward passes without gradient, and nobody else may use `trained`."""
        if self.copy is not None:
            yield self.copy
            return
        present = {weight: weight.detach().clone() for weight in self.adapters}
        try:
            put(self.adapters)
            yield self.trained
        finally:
            put(present)


@torch.no_grad()
def put(values: Mapping[nn.Parameter, Tensor]) -> None:
    for weight, value in values.items():
        weight.copy_(value)


def frozen_copy(model: Decoder, mesh: DeviceMesh | None) -> Decoder:
    return copy.deepcopy(model).requires_grad_(False) if mesh is None else shard(model, mesh, trained=False)
