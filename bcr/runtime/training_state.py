"""Everything that the next step depends on, into a checkpoint and back, bit for bit.

The tensors (weights in float32, optimizer state) go through `torch.distributed.checkpoint` under the parameters' names, each rank writing
its shards, so that what one number of processes wrote another can read. The rest is small and readable: `state.json`.
"""

from __future__ import annotations

import base64
import json
import platform
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from bcr.model import Decoder
from bcr.model.lora import empty_twin
from bcr.parallel.ranks import Ranks
from bcr.parallel.sharding import publish
from bcr.runtime.checkpoint import partial_of, save_checkpoint
from bcr.tasks.dialect import Dialect

FOLDER = "training"  # inside a checkpoint
FORMAT = 2


class Trained(Protocol):
    """What a learner trains, in shards or whole."""

    @property
    def model(self) -> Decoder: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...


class Stateful(Protocol):
    """Whatever has a state of plain JSON values: cursors, counters."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Snapshot:
    """Copies on the CPU, which later steps do not touch: of one rank its shards, on the first also what is not sharded."""

    tensors: dict[str, Tensor]
    ranks: Ranks
    whole: Decoder | None  # for Hugging Face's readers
    plain: dict[str, Any]


def take_snapshot(
    step: int,
    learner: Trained | None,
    whole: Decoder,
    parts: Mapping[str, Stateful],
    offsets: Mapping[str, int],
    ranks: Ranks,
    learners: Ranks | None = None,
) -> Snapshot | None:
    """The state after `step` steps; every rank takes part. None on a rank that has no learner, where only some, the `learners`, have one.

    `whole`: the learner's model, or the copy that the sampler reads of its shards, on the meta device where other ranks sample.
    `offsets`: bytes of the run's files so far, to which a resumed run cuts them.
    """
    learners = learners or ranks
    plain = {
        "format": FORMAT,
        "step": step,
        "ranks": ranks.size,
        "samplers": ranks.size - learners.size,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "dtype": str(whole.head_weight.dtype),
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "random": ranks.gather_first(random_states()),
        "offsets": dict(offsets),
    }
    if learner is None:
        return None
    live = {**originals(learner), **optimizer_tensors(learner)}
    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in sorted(live.items())}  # files do not tell whether a run was resumed
    return Snapshot(tensors, learners, whole_copy(learner.model, whole, tensors, ranks.first), plain)


def whole_copy(trained: Decoder, whole: Decoder, tensors: Mapping[str, Tensor], first: bool) -> Decoder | None:
    """The whole decoder on the CPU, for the first rank. Of shards of which no rank here keeps a whole copy it is gathered by all."""
    if not whole.head_weight.is_meta:
        return copy_of(whole, tensors if whole is trained else {}) if first else None
    copy = empty_twin(whole).to(whole.head_weight.dtype)
    publish(trained, copy.to_empty(device="cpu") if first else copy, frozen=True)  # into nothing, on the other ranks
    copy.companions = whole.companions
    return copy if first else None


def copy_of(model: Decoder, originals: Mapping[str, Tensor]) -> Decoder:
    """A decoder on the CPU with copies of the weights, or with the `originals` that are copies already."""
    copy, weights = empty_twin(model), {}
    for name, weight in model.state_dict().items():
        original = originals.get(f"model.{name}")
        weights[name] = weight.to("cpu", copy=True) if original is None else original.to(weight.dtype)
    copy.load_state_dict(weights, assign=True)
    copy.companions = model.companions
    return copy


def write_checkpoint(snapshot: Snapshot, dialect: Dialect, card: str, folder: Path) -> None:
    """A whole checkpoint: the model for Hugging Face's readers, and the state for us. Every rank writes its part of the state."""
    if snapshot.whole is None:
        write(snapshot, partial_of(folder))
    else:
        save_checkpoint(snapshot.whole, dialect.tokenizer, dialect.stop_token_ids, folder, card, add=partial(write, snapshot))


def write(snapshot: Snapshot, checkpoint: Path) -> None:
    """Into the folder `training` of a checkpoint that is being written. OSError if the disk is full."""
    folder, ranks = checkpoint / FOLDER, snapshot.ranks
    if ranks.first:
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps(snapshot.plain) + "\n")
    if ranks.size > 1:
        dist.barrier(ranks.background)  # the folder is there
    options: dict[str, Any] = {"process_group": ranks.background} if ranks.size > 1 else {"no_dist": True}
    with single_process_allowed(), failures_of_ranks():
        dcp.save(dict(snapshot.tensors), storage_writer=dcp.FileSystemWriter(folder, sync_files=False), **options)


def read_plain(checkpoint: Path) -> dict[str, Any]:
    """`state.json`. ValueError for a checkpoint without one, or of another format."""
    file = checkpoint / FOLDER / "state.json"
    if not file.exists():
        raise ValueError("it has no training state")
    plain: dict[str, Any] = json.loads(file.read_text())
    if plain["format"] != FORMAT:
        raise ValueError(f"its format is {plain['format']}, and this version of bcr reads {FORMAT}")
    return plain


def restore(checkpoint: Path, learner: Trained | None, parts: Mapping[str, Stateful], ranks: Ranks, learners: Ranks | None = None) -> None:
    """Put everything back; every rank takes part, the `learners` alone with a learner, and there may be other ranks than wrote it.

    Only for a checkpoint of ours whose checksums hold (`checkpoint.damage`): its index is a pickle.
    """
    plain = read_plain(checkpoint)
    if learner is not None:
        restore_tensors(checkpoint, learner, learners or ranks)
    for name, part in parts.items():
        part.load_state_dict(plain["parts"][name])
    if len(plain["random"]) == ranks.size:
        restore_random_states(plain["random"][ranks.rank])


def restore_tensors(checkpoint: Path, learner: Trained, ranks: Ranks) -> None:
    reader = dcp.FileSystemReader(checkpoint / FOLDER)
    places: dict[str, Tensor] = originals(learner)
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if name not in places:  # the optimizer's: of a weight's size, in shards as the weight is, or a number
            weight = places["model." + name.removeprefix("optimizer.").rpartition(".")[0]]
            like = torch.empty_like(weight, dtype=entry.properties.dtype)  # type: ignore[union-attr]
            places[name] = like if like.shape == entry.size else torch.empty(entry.size, dtype=like.dtype)  # type: ignore[union-attr]
    with single_process_allowed():
        dcp.load(dict(places), storage_reader=reader, process_group=ranks.background, no_dist=ranks.size == 1)
    for name, weight in learner.model.named_parameters():
        prefix, owner = f"optimizer.{name}.", owner_of(weight, learner.optimizer)
        found = {key.removeprefix(prefix): tensor.to(weight.device) for key, tensor in places.items() if key.startswith(prefix)}
        if owner is not weight:
            weight.detach().copy_(owner)
        if found:  # placed as they were, and not by `load_state_dict`, which would cast them to the parameter's dtype
            learner.optimizer.state[owner] = found


@contextmanager
def single_process_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextmanager
def failures_of_ranks() -> Iterator[None]:
    """Where a rank fails, torch raises a CheckpointException on all, which is no Exception; here it becomes that rank's own error."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        raise first if isinstance(first, OSError) else RuntimeError(f"rank {rank} could not write its part of a checkpoint") from first


def originals(learner: Trained) -> dict[str, Tensor]:
    """What the optimizer writes, by the parameters' names: float32, whole or in shards, whatever the dtype of the working weights."""
    return {f"model.{name}": owner_of(weight, learner.optimizer).detach() for name, weight in learner.model.named_parameters()}


def optimizer_tensors(learner: Trained) -> dict[str, Tensor]:
    """State by parameter name, `optimizer.<parameter>.<exp_avg and so on>`, none before the first update."""
    states = (
        (name, learner.optimizer.state.get(owner_of(weight, learner.optimizer), {})) for name, weight in learner.model.named_parameters()
    )
    return {f"optimizer.{name}.{key}": value for name, state in states for key, value in state.items()}


def owner_of(weight: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """The tensor under which the optimizer keeps its state: the float32 master of a narrow weight, else the weight itself."""
    masters: Mapping[Tensor, Tensor] = getattr(optimizer, "master_of", {})
    return masters.get(weight, weight)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


def random_states() -> dict[str, Any]:
    """Of every generator that code might draw from. (Sampling draws from none: its randomness is keyed.)"""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state()  # noqa: NPY002  the global generator, for libraries that draw from it
    return {
        "python": [version, list(words), gauss],
        "numpy": [legacy[0], legacy[1].tolist(), *legacy[2:]],  # type: ignore[index]
        "torch": as_text(torch.get_rng_state()),
        "cuda": [as_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(as_tensor(states["torch"]))
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all([as_tensor(state) for state in states["cuda"]])


def as_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def as_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
