"""Adapters in the files of `peft`: written beside a checkpoint, and read from any folder that has nothing but A and B on our layers."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from bcr.model.decoder import Decoder
from bcr.model.lora import TARGETS, Adapter, adapted_layers
from bcr.model.weights import read_tensors, stored_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FOLDER = "adapter"  # in a checkpoint; beside a config.json `transformers` would take the merged weights for the adapter's base
PEFT_PREFIX = "base_model.model.model."
UNSUPPORTED = {  # of peft's config: values that change the function, and what they must be here
    "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "layers_to_transform": None, "lora_bias": False, "trainable_token_indices": None,
}  # fmt: skip


def under_peft_names(model: Decoder) -> dict[str, Tensor]:
    """Views of the adapters: what is written to a view is in the model."""
    views = {}
    for name, layer in adapted_layers(model).items():
        owner = name.rpartition(".")[0]
        for target, _, down, up in layer.parts():
            views[f"{PEFT_PREFIX}{owner}.{target}.lora_A.weight"] = down
            views[f"{PEFT_PREFIX}{owner}.{target}.lora_B.weight"] = up
    return views


def write_adapter(model: Decoder, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, for `PeftModel.from_pretrained(base, folder)`. OSError if the disk is full."""
    assert model.adapter is not None
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.adapter.base,
        "r": model.adapter.rank,
        "lora_alpha": model.adapter.alpha,
        "target_modules": list(model.adapter.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    save_file({name: view.cpu().clone() for name, view in under_peft_names(model).items()}, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter_config(folder: Path) -> Adapter:
    """ValueError, with one sentence, for a folder without an adapter, and for what this decoder cannot do."""
    file = folder / CONFIG
    if not file.exists():
        raise ValueError(f"model.lora.path is {str(folder)!r}; there is no {CONFIG}.")
    if not (folder / WEIGHTS).exists():
        raise ValueError(f"{folder}: there is no {WEIGHTS}; pickled adapters are refused, for unpickling runs code.")
    try:
        raw = json.loads(file.read_text())
        kind, rank, alpha = raw.get("peft_type"), raw.get("r"), raw.get("lora_alpha")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is no JSON object ({error}).") from error
    if kind != "LORA" or not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ValueError(f"{file}: peft_type is {kind!r}, r {rank!r}, lora_alpha {alpha!r}; it must be LORA with two numbers.")
    for name, plain in UNSUPPORTED.items():
        if raw.get(name, plain) not in (plain, None):
            raise ValueError(f"{file}: {name} is {raw[name]!r}; only adapters with {name} = {plain!r} are supported.")
    found = {name.split(".")[-3] for name in stored_tensors(folder, WEIGHTS)}
    if unknown := sorted(found - {*TARGETS}):
        raise ValueError(f"{folder}: {WEIGHTS} adapts {', '.join(unknown)}; supported are {', '.join(TARGETS)}.")
    return Adapter(rank, float(alpha), tuple(target for target in TARGETS if target in found))


def load_adapter(model: Decoder, folder: Path) -> None:
    """Copy the tensors of an adapter into those attached. ValueError where names or shapes differ."""
    places = under_peft_names(model)
    stored = stored_tensors(folder, WEIGHTS)
    for name in sorted(places.keys() | stored.keys()):
        if name not in stored or name not in places:
            raise ValueError(
                f"{folder}: the tensor {name!r} is {'missing' if name in places else 'one for which this model has no place'}."
            )
        if stored[name][0] != tuple(places[name].shape):
            raise ValueError(f"{folder}: {name!r} has shape {stored[name][0]}; the model calls for {tuple(places[name].shape)}.")
    for name, tensor in read_tensors(folder / WEIGHTS, list(stored)):
        places[name].copy_(tensor)
