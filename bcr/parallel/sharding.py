"""The weights of a decoder in float32 shards over the ranks, by torch's `fully_shard` (FSDP2), and back into a whole copy for the sampler.

Each layer is a unit whose weights are gathered, in the dtype of computing, when its forward or backward comes, and freed after it. What is
left (embedding, last norm, head) is the unit of the root: whole from the start of the forward to the end of the backward. So the head's
operation runs inside the root's forward (`Decoder.forward(head=...)`), where its weight, which may be the embedding's too, is whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from bcr.model import Decoder
from bcr.model.lora import empty_twin

NARROW = (torch.bfloat16, torch.float16)


def shard(model: Decoder, mesh: DeviceMesh, trained: bool = True) -> Decoder:
    """A decoder with the weights of `model` in shards over `mesh`; `model` itself stays whole and as it is. Every rank calls it.

    mesh: ("shard",), or ("replicate", "shard") for shards inside each group of ranks and copies of them between the groups (HSDP).
    Parameters keep their names and are DTensors, float32 where `model`'s are narrower and trained, and are computed with in `model`'s
    dtype. Gradients are summed over the ranks in float32, not averaged: the loss has global denominators already. Not `trained`: frozen.
    """
    dtype = model.head_weight.dtype
    narrow = dtype in NARROW
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if narrow else None, reduce_dtype=torch.float32 if narrow else None, cast_forward_inputs=False
    )
    sharded = empty_twin(model)
    sharded.activation_checkpointing, sharded.invariant = model.activation_checkpointing, model.invariant
    for part, whole in zip(units(sharded), units(model), strict=True):
        for name, weight in own_weights(whole):
            learnt = trained and weight.requires_grad
            copy = weight.detach().to(torch.float32 if narrow and learnt else dtype, copy=True)
            owner, _, leaf = name.rpartition(".")
            setattr(part.get_submodule(owner), leaf, nn.Parameter(copy, requires_grad=learnt))
        fully_shard(part, mesh=mesh, mp_policy=policy)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return sharded


def units(model: Decoder) -> Iterator[nn.Module]:
    """What is gathered at a time: each layer, then the root with the rest."""
    yield from model.layers
    yield model


def own_weights(unit: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A unit's parameters by name: the root's are those of no layer."""
    return ((name, weight) for name, weight in unit.named_parameters() if not (isinstance(unit, Decoder) and name.startswith("layers.")))


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@torch.no_grad()
def publish(sharded: Decoder, copy: Decoder) -> None:
    """Write the weights of `sharded` into the whole `copy`, in its dtype and in place. Every rank calls it.

    Unit by unit, so that no more than one of them is whole beside the copy; narrow weights travel narrow.
    """
    for part, whole in zip(units(sharded), units(copy), strict=True):
        targets = dict(own_weights(whole))
        trained = [name for name, weight in own_weights(part) if weight.requires_grad]
        if not trained:
            continue
        assert isinstance(part, FSDPModule)
        part.unshard()
        gathered = dict(own_weights(part))
        for name in trained:
            targets[name].copy_(gathered[name])
        part.reshard()


def release(model: Decoder) -> None:
    """Free what the root keeps whole after a forward that no backward follows."""
    if isinstance(model, FSDPModule):
        model.reshard()


def reduce_between_replicas(model: Decoder, wanted: bool) -> None:
    """Whether the next backward also sums gradients over the copies of the shards (HSDP): the last pack's does it for all of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(wanted)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or, of a sharded one, all of it, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def training_memory(sharded: Decoder) -> list[Tensor]:
    """Tensors of the size of what a step holds beside activations and a whole working copy of the weights: this rank's share of the
    gradients, of AdamW's moments, the root's unit and two layers while they are whole, and one gradient on its way in float32.

    Moments count even where they exist already: the probe runs before the first update.
    """
    if not is_sharded(sharded):
        return []
    shards = [torch.empty_like(weight.to_local()) for weight in sharded.parameters() for _ in range(3) if isinstance(weight, DTensor)]
    sizes = [sum(weight.numel() for _, weight in own_weights(unit)) for unit in units(sharded)]
    weight = next(sharded.parameters())
    *layers, root = sizes
    gathered = torch.empty(root + 2 * max(layers), dtype=weight.dtype, device=weight.device)
    return [*shards, gathered, torch.empty(max(sizes), dtype=torch.float32, device=weight.device)]
