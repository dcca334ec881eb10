"""Checkpoints in Hugging Face layout, in and out: config.json and safetensors that `transformers` loads unchanged.

Families: Qwen3 (q/k norm), Qwen2 (qkv bias) and Llama, dense, plain RoPE. Our decoder keeps q, k, v in one matrix and gate, up
in another; `FUSED` is the whole difference in names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bcr.model.decoder import Decoder, DecoderConfig

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

FAMILIES = {  # model_type: (architecture, switches of our config)
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True, "qkv_bias": False}),
    "qwen2": ("Qwen2ForCausalLM", {"qk_norm": False, "qkv_bias": True}),
    "llama": ("LlamaForCausalLM", {"qk_norm": False, "qkv_bias": False}),
}

SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def load_pretrained(path_or_repo: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """The decoder of a checkpoint folder, or of a hub repository (downloaded by `huggingface_hub`).

    Raises ValueError, with one sentence, for a folder without config or weights, an unsupported architecture, a missing or
    damaged shard, and tensors that are missing, unknown or of another shape than the config says. Pickled weights are refused.
    """
    folder = resolve(path_or_repo)
    config = read_config(folder)
    with torch.device("meta"):
        model = Decoder(config)
    state = read_weights(folder)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    expected = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in unfuse(model.state_dict(), config).items()}
    for name in sorted(expected.keys() | state.keys()):
        if name not in state:
            raise ValueError(f"{folder}: the weights lack the tensor {name!r} that config.json calls for.")
        if name not in expected:
            raise ValueError(f"{folder}: the weights hold the tensor {name!r}, for which this architecture has no place.")
        if tuple(state[name].shape) != expected[name]:
            raise ValueError(f"{folder}: {name!r} has shape {tuple(state[name].shape)}; config.json calls for {expected[name]}.")
    state = fuse(state, config)
    model.load_state_dict({name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()}, assign=True)
    return model.requires_grad_(True)


def save_pretrained(
    model: Decoder, folder: str | Path, *, eos_token_id: int | list[int] | None = None, bos_token_id: int | None = None
) -> None:
    """Write config.json, generation_config.json and model.safetensors into `folder` (made if missing). OSError if the disk is full."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    described = {"architectures": [FAMILIES[family][0]], "model_type": family, "hidden_act": "silu", "dtype": dtype, **fields}
    write_json(folder / "config.json", {**described, "rope_theta": config.rope_theta, "rope_parameters": rope, **special})
    write_json(folder / "generation_config.json", special)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in unfuse(model.state_dict(), config).items()}
    try:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder / 'model.safetensors'} could not be written ({error})") from error


def resolve(path_or_repo: str | Path) -> Path:
    """The local folder of a checkpoint; a name like `org/name` that is no folder is fetched from the hub."""
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(path_or_repo).count("/") != 1 or str(path_or_repo).startswith("."):
        raise ValueError(f"model.path is {str(path_or_repo)!r}, which is neither a folder nor a hub repository of the form org/name.")
    from huggingface_hub import snapshot_download  # imported here: it takes a second and most runs are local

    try:
        return Path(snapshot_download(str(path_or_repo), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]))
    except Exception as error:
        raise ValueError(f"model.path is {str(path_or_repo)!r}: no such folder, and the hub did not give it ({error}).") from error


def read_config(folder: Path) -> DecoderConfig:
    """Our config from config.json; ValueError for what this decoder cannot do."""
    raw = read_json(folder / "config.json", f"{folder}: there is no config.json, so this is not a Hugging Face model folder.")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{folder}: model_type is {family!r}; supported are {', '.join(sorted(FAMILIES))}.")
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{folder}: RoPE scaling {rope.get('rope_type', rope.get('type'))!r} is not supported; only plain RoPE is.")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported.")
    if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or []):
        raise ValueError(f"{folder}: config.json asks for sliding-window attention, which is not supported.")
    optional = ("num_key_value_heads", "head_dim", "tie_word_embeddings")
    lacking = [name for name in SHARED_FIELDS if name not in optional and raw.get(name) is None]
    if lacking:
        raise ValueError(f"{folder}: config.json does not say {', '.join(lacking)}.")
    heads = raw["num_attention_heads"]
    defaults = {"num_key_value_heads": heads, "head_dim": raw["hidden_size"] // heads, "tie_word_embeddings": False}
    fields = {name: raw[name] if raw.get(name) is not None else defaults[name] for name in SHARED_FIELDS}
    switches = FAMILIES[family][1]
    if raw.get("attention_bias"):
        raise ValueError(f"{folder}: attention_bias is set, and {family} is supported without it.")
    return DecoderConfig(**fields, **switches, rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files, under their Hugging Face names without the leading `model.`."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(read_json(index, "")["weight_map"].values()))
    elif (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ValueError(f"{folder}: the weights are pickled, and unpickling runs code; convert them to safetensors.")
    else:
        raise ValueError(f"{folder}: there are no weights (model.safetensors).")
    state: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).exists():
            raise ValueError(f"{folder}: the shard {name} is missing.")
        try:
            state |= load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder}: {name} is damaged ({error}).") from error
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}


def fuse(state: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Hugging Face names to ours, of a complete state: q, k, v and gate, up are laid one under the other."""
    fused = dict(state)
    for layer in range(config.num_hidden_layers):
        for ours, theirs in FUSED.items():
            for kind in ("weight", "bias"):
                room = "self_attn" if ours == "qkv_proj" else "mlp"
                names = [f"layers.{layer}.{room}.{name}.{kind}" for name in theirs]
                if names[0] in fused:
                    fused[f"layers.{layer}.{room}.{ours}.{kind}"] = torch.cat([fused.pop(name) for name in names])
    return fused


def unfuse(state: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Our names to Hugging Face's; the opposite of `fuse`, with the leading `model.` put back."""
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    sizes = {"qkv_proj": [n * config.head_dim for n in heads], "gate_up_proj": [config.intermediate_size] * 2}
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = next((fused for fused in FUSED if f".{fused}." in name), None)
        prefix = "" if name.startswith("lm_head") else "model."
        if ours is None:
            split[prefix + name] = tensor
            continue
        for theirs, part in zip(FUSED[ours], tensor.split(sizes[ours]), strict=True):
            split[prefix + name.replace(ours, theirs)] = part
    return split


def stop_token_ids(folder: Path) -> list[int]:
    """The EOS ids that generation_config.json, or else config.json, names."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            eos = read_json(folder / name, "").get("eos_token_id")
            if eos is not None:
                return list(eos) if isinstance(eos, list) else [eos]
    raise ValueError(f"{folder}: neither generation_config.json nor config.json names an eos_token_id, so no completion could ever end.")


def read_json(path: Path, missing: str) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(missing)
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}, indent=2) + "\n")
