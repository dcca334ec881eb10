"""Everything that the next step depends on, into a checkpoint and back, bit for bit.

The tensors (weights, optimizer state) go through `torch.distributed.checkpoint` under the parameters' names, so that what one number of
processes wrote another can read. The rest is small and readable: `state.json`.
"""

from __future__ import annotations

import base64
import json
import platform
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from bcr.model import Decoder
from bcr.model.lora import empty_twin
from bcr.runtime.checkpoint import save_checkpoint
from bcr.tasks.dialect import Dialect

FOLDER = "training"  # inside a checkpoint
FORMAT = 1
MASTER = "master"  # the float32 original of a narrow weight


class Stateful(Protocol):
    """Whatever has a state of plain JSON values: cursors, counters."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Snapshot:
    """Copies on the CPU, which later steps do not touch."""

    model: Decoder  # made of `tensors`
    tensors: dict[str, Tensor]
    plain: dict[str, Any]


def take_snapshot(
    step: int, model: Decoder, optimizer: torch.optim.Optimizer, parts: Mapping[str, Stateful], offsets: Mapping[str, int]
) -> Snapshot:
    """The state after `step` steps. `offsets`: bytes of the run's files so far, to which a resumed run cuts them."""
    plain = {
        "format": FORMAT,
        "step": step,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "random": random_states(),
        "offsets": dict(offsets),
    }
    live = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}
    copy = empty_twin(model)
    copy.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()}, assign=True)
    copy.companions = model.companions
    return Snapshot(copy, tensors, plain)


def write_checkpoint(snapshot: Snapshot, dialect: Dialect, card: str, folder: Path) -> Path:
    """A whole checkpoint: the model for Hugging Face's readers, and the state for us."""
    return save_checkpoint(snapshot.model, dialect.tokenizer, dialect.stop_token_ids, folder, card, add=partial(write, snapshot))


def write(snapshot: Snapshot, checkpoint: Path) -> None:
    """Into the folder `training` of a checkpoint that is being written. OSError if the disk is full."""
    folder = checkpoint / FOLDER
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is: one process writes
        dcp.save(dict(snapshot.tensors), storage_writer=dcp.FileSystemWriter(folder, sync_files=False), no_dist=True)
    (folder / "state.json").write_text(json.dumps(snapshot.plain) + "\n")


def read_plain(checkpoint: Path) -> dict[str, Any]:
    """`state.json`. ValueError for a checkpoint without one, or of another format."""
    file = checkpoint / FOLDER / "state.json"
    if not file.exists():
        raise ValueError("it has no training state")
    plain: dict[str, Any] = json.loads(file.read_text())
    if plain["format"] != FORMAT:
        raise ValueError(f"its format is {plain['format']}, and this version of bcr reads {FORMAT}")
    return plain


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, parts: Mapping[str, Stateful]) -> None:
    """Put everything back. Only for a checkpoint of ours whose checksums hold (`checkpoint.damage`): its index is a pickle."""
    plain = read_plain(checkpoint)
    reader = dcp.FileSystemReader(checkpoint / FOLDER)
    described = reader.read_metadata().state_dict_metadata
    places: dict[str, Any] = model_tensors(model)
    places |= {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items() if name not in places}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(places, storage_reader=reader, no_dist=True)
    for name, weight in model.named_parameters():
        prefix, owner = f"optimizer.{name}.", owner_of(weight, optimizer)
        found = {key.removeprefix(prefix): tensor.to(weight.device) for key, tensor in places.items() if key.startswith(prefix)}
        if (MASTER in found) != (owner is not weight):
            raise ValueError(f"{checkpoint}: {name} was kept in another precision; resume with the dtype that the run began with.")
        if owner is not weight:
            owner.detach().copy_(found.pop(MASTER))
        if found:  # placed as they were, and not by `load_state_dict`, which would cast them to the parameter's dtype
            optimizer.state[owner] = found
    for name, part in parts.items():
        part.load_state_dict(plain["parts"][name])
    restore_random_states(plain["random"])


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State by parameter name, `optimizer.<parameter>.<exp_avg and so on>`, none before the first update; and the float32 masters."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        owner = owner_of(weight, optimizer)
        kept = optimizer.state.get(owner, {}) | ({} if owner is weight else {MASTER: owner})
        tensors |= {f"optimizer.{name}.{key}": value for key, value in kept.items()}
    return tensors


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
