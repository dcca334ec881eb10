"""The weights of a decoder in float32 shards over the ranks, by torch's `fully_shard` (FSDP2), and back into a whole copy for the sampler.

Each layer is a unit whose weights are gathered, in the dtype of computing, when its forward or backward comes, and freed after it. What is
left (embedding, last norm, head) is the unit of the root: whole from the start of the forward to the end of the backward. So the head's
operation runs inside the root's forward (`Decoder.forward(head=...)`), where its weight, which may be the embedding's too, is whole.

With low-rank adapters a unit holds frozen weights, in the dtype of computing, beside float32 adapters; only what is trained has gradients
and is reduced (a unit may mix both; its trained parameters must have one dtype).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
def publish(sharded: Decoder, copy: Decoder, frozen: bool = False) -> None:
    """Write the weights of `sharded` that are trained, or with `frozen` all, into the whole `copy`, in its dtype and in place.

    Every rank calls it.
    """
    for weight, target in zip(streamed(sharded, frozen), streamed(copy, frozen), strict=True):
        target.copy_(weight)


def streamed(model: Decoder, frozen: bool = False) -> Iterator[Tensor]:
    """The weights that are trained, or with `frozen` all, one by one, in an order that is the same for a whole decoder and its shards.

    Of shards every rank goes through them to the end; each is whole, in the dtype of computing, until the next is asked for. They come unit
    by unit, so that no more than one of them is whole at a time; narrow weights travel narrow.
    """
    for unit in units(model):
        weights = dict(own_weights(unit))
        wanted = [name for name, weight in weights.items() if frozen or weight.requires_grad]
        if not isinstance(unit, FSDPModule):
            yield from (weights[name].detach() for name in wanted)
        elif len(wanted) < len(weights):
            yield from gathered([weights[name] for name in wanted], model.head_weight.dtype)  # type: ignore[misc]
        else:
            unit.unshard()
            yield from (weight.detach() for _, weight in own_weights(unit))
            unit.reshard()


def gathered(weights: Sequence[DTensor], dtype: torch.dtype) -> list[Tensor]:
    """Matrices in shards of their rows, whole and in `dtype`: all of them by one all-gather, and nothing else of their unit."""
    if not weights:
        return []
    group = weights[0].device_mesh.get_group("shard")
    rows = [-(-weight.shape[0] // group.size()) for weight in weights]  # of a shard; the last ones may have fewer, and are filled up
    shards = [weight.to_local().to(dtype) for weight in weights]
    mine = torch.cat([F.pad(shard, (0, 0, 0, most - len(shard))).flatten() for shard, most in zip(shards, rows, strict=True)])
    everyones = mine.new_empty(group.size(), mine.numel())
    dist.all_gather([*everyones], mine, group=group)
    parts = everyones.split([most * weight.shape[1] for weight, most in zip(weights, rows, strict=True)], dim=1)
    return [part.reshape(-1, weight.shape[1])[: weight.shape[0]] for weight, part in zip(weights, parts, strict=True)]


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

    Moments count even where they exist already: the probe runs before the first update. What is frozen has neither.
    """
    if not is_sharded(sharded):
        return []
    trained = [weight for weight in sharded.parameters() if weight.requires_grad and isinstance(weight, DTensor)]
    shards = [torch.empty_like(weight.to_local()) for weight in trained for _ in range(3)]
    sizes = [sum(weight.numel() for _, weight in own_weights(unit)) for unit in units(sharded)]
    reduced = [sum(weight.numel() for _, weight in own_weights(unit) if weight.requires_grad) for unit in units(sharded)]
    weight = next(sharded.parameters())
    *layers, root = sizes
    gathered = torch.empty(root + 2 * max(layers), dtype=weight.dtype, device=weight.device)
    return [*shards, gathered, torch.empty(max(reduced), dtype=torch.float32, device=weight.device)]
