"""The tensors of a checkpoint: safetensors files under Hugging Face's names, streamed into and out of the decoder's own tensors.

Our decoder keeps q, k, v in one matrix and gate, up in another; `under_their_names` is the whole difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bcr.model.decoder import DecoderConfig

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
STORED = {"F64", "F32", "F16", "BF16"}  # dtypes, in the words of safetensors, that are weights and not codes for weights
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000
UNMAP_BYTES = 64_000_000  # what is read of a mapped file counts as memory while it is open; so it is opened anew after so much


def under_their_names(state: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Views of our tensors under Hugging Face's names: what is written to a view is in our tensor."""
    views: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = next((fused for fused in FUSED if f".{fused}." in name), None)
        prefix = "" if name.startswith("lm_head") else "model."
        if ours is None:
            views[prefix + name] = tensor
            continue
        for theirs, part in zip(FUSED[ours], tensor.split(part_sizes(ours, tensor.shape[0], config)), strict=True):
            views[prefix + name.replace(ours, theirs)] = part
    return views


def part_sizes(name: str, rows: int, config: DecoderConfig) -> list[int]:
    """Of the matrix `name` with so many rows, how many belong to each of its parts (in the order of FUSED)."""
    if name == "qkv_proj":
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        return [count * config.head_dim for count in heads]
    return [rows // 2] * 2 if name in FUSED else [rows]


# ---- in -----------------------------------------------------------------------------------------------------------------------


def fill_from(folder: Path, places: dict[str, Tensor], ignored: set[str]) -> None:
    """Copy every stored tensor to its place, converted to the place's dtype and device, one tensor in memory at a time.

    `places` and `ignored` have Hugging Face's names without the leading `model.`, which some backbones lack. Names, shapes and dtypes are
    all checked before anything is read. Raises ValueError, with one sentence.
    """
    files = {file: stored_tensors(folder, file) for file in weight_files(folder)}
    stored = {name.removeprefix("model."): described for tensors in files.values() for name, described in tensors.items()}
    stored = {name: described for name, described in stored.items() if not skipped(name, ignored)}
    for name in sorted(places.keys() | stored.keys()):
        if name not in stored:
            raise ValueError(f"{folder}: the weights lack the tensor {name!r} that config.json calls for.")
        if name not in places:
            raise ValueError(f"{folder}: the weights hold the tensor {name!r}, for which this architecture has no place.")
        shape, dtype = stored[name]
        if shape != tuple(places[name].shape):
            raise ValueError(f"{folder}: {name!r} has shape {shape}; config.json calls for {tuple(places[name].shape)}.")
        if dtype not in STORED:
            raise ValueError(
                f"{folder}: {name!r} is stored as {dtype}; quantised weights are not supported, only {', '.join(sorted(STORED))}."
            )
    for file, tensors in files.items():
        wanted = [name for name in tensors if not skipped(name.removeprefix("model."), ignored)]
        for name, tensor in read_tensors(folder / file, wanted):
            places[name.removeprefix("model.")].copy_(tensor)


def skipped(name: str, ignored: set[str]) -> bool:
    return name in ignored or name.endswith("rotary_emb.inv_freq")


def weight_files(folder: Path) -> list[str]:
    """Names of the folder's safetensors files; ValueError where one is missing or the weights are pickled."""
    index = folder / INDEX
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is no index of shards ({type(error).__name__}: {error}).") from error
    elif (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ValueError(f"{folder}: the weights are pickled, and unpickling runs code; convert them to safetensors.")
    else:
        raise ValueError(f"{folder}: there are no weights (model.safetensors).")
    for file in files:
        if not (folder / file).exists():
            raise ValueError(f"{folder}: the shard {file} is missing.")
    return files


def stored_tensors(folder: Path, file: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, dtype)} from a file's header; ValueError for a damaged file, one that was cut off included."""
    try:
        with safe_open(folder / file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (a method, no mapping)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: {file} is damaged ({error}).") from error


def read_tensors(path: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one after the other, mapped from the file. Keep none of them: a file in use stays mapped."""
    left = iter(names)
    name = next(left, None)
    while name is not None:
        with safe_open(path, framework="pt") as opened:
            read = 0
            while name is not None and read < UNMAP_BYTES:
                tensor = opened.get_tensor(name)
                read += tensor.nbytes
                yield name, tensor
                del tensor
                name = next(left, None)


# ---- out ----------------------------------------------------------------------------------------------------------------------


def write_weights(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """model.safetensors, or numbered shards of at most `shard_bytes` and their index. One shard at a time leaves the device."""
    plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file} could not be written ({error})") from error
    if plan.is_sharded:
        index: dict[str, Any] = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def empty_state(model: torch.nn.Module, dtype: torch.dtype, device: str | torch.device) -> dict[str, Tensor]:
    """Uninitialised tensors of the shapes that a model on the meta device has."""
    return {name: torch.empty(tensor.shape, dtype=dtype, device=device) for name, tensor in model.state_dict().items()}
