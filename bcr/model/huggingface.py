"""Checkpoints in Hugging Face layout, in and out: config.json, safetensors and all that lies beside them, for `transformers` unchanged.

Families: Qwen3 (q/k norm), dense and mixture of experts, Qwen2 (qkv bias) and Llama; RoPE plain or scaled (`bcr.model.rotary`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bcr.model import adapter_files, lora
from bcr.model.decoder import Decoder, DecoderConfig
from bcr.model.rotary import RopeScaling
from bcr.model.weights import INDEX, SHARD_BYTES, empty_state, fill_from, under_their_names, write_weights

FAMILIES = {  # model_type: (architecture, switches of our config)
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True, "qkv_bias": False}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"qk_norm": True, "qkv_bias": False}),
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

MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")

COMPANIONS = (  # what belongs to a checkpoint beside its weights
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
STALE = (
    "rope_scaling",
    "num_local_experts",
    "torch_dtype",
    "auto_map",
    "transformers_version",
)  # of the config.json that a model was loaded with


def load_pretrained(path_or_repo: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """The decoder of a checkpoint folder, or of a hub repository (downloaded by `huggingface_hub`), its weights as `dtype` on `device`.

    The weights are read one tensor at a time into their place, so the memory needed is that of the model and of its largest tensor.
    Tokenizer, chat template and configs are kept with the decoder (`companions`), for `save_pretrained`.
    Raises ValueError, with one sentence, for a folder without config or weights, an unsupported architecture, a missing or
    damaged shard, and tensors that are missing, unknown or of another shape than the config says. Pickled weights are refused.
    """
    folder = resolve(path_or_repo)
    config = read_config(folder)
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(empty_state(model, dtype, device), assign=True)
    places = {name.removeprefix("model."): view for name, view in under_their_names(model.state_dict(), config).items()}
    fill_from(folder, places, ignored={"lm_head.weight"} if config.tie_word_embeddings else set())
    model.companions = {name: (folder / name).read_bytes() for name in COMPANIONS if (folder / name).exists()}
    return model.requires_grad_(True)


def save_pretrained(
    model: Decoder,
    folder: str | Path,
    *,
    eos_token_id: int | list[int] | None = None,
    bos_token_id: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, generation_config.json and the weights, in the model's dtype, into `folder` (made if missing).

    A model that was loaded brings its companions: tokenizer and chat template are written as they were, and of its two configs all
    that we know nothing of. `eos_token_id` and `bos_token_id` default to what they say. Above `shard_bytes` the weights are
    written in shards with an index. Low-rank adapters are merged into the weights, and written alone into the folder `adapter`.
    OSError if the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in (INDEX, "model.safetensors"):  # a reader would take the one for the other
        (folder / earlier).unlink(missing_ok=True)
    for name, content in model.companions.items():
        (folder / name).write_bytes(content)
    special = {name: value for name, value in (("bos_token_id", bos_token_id), ("eos_token_id", eos_token_id)) if value is not None}
    config, generation = (json.loads(model.companions.get(name, b"{}")) for name in ("config.json", "generation_config.json"))
    kept = {name: value for name, value in config.items() if name not in STALE}
    write_json(folder / "config.json", {**kept, **describe(model), **special})
    write_json(folder / "generation_config.json", {**generation, **special})
    state = lora.merged_state(model) if model.adapter else model.state_dict()
    write_weights(folder, under_their_names(state, model.config), shard_bytes)
    if model.adapter:
        adapter_files.write_adapter(model, folder / adapter_files.FOLDER)


def describe(model: Decoder) -> dict[str, Any]:
    """The config.json of a decoder, without its special tokens."""
    config = model.config
    family = ("qwen3_moe" if config.num_experts else "qwen3") if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    scaling = config.rope_scaling.fields() if config.rope_scaling else {"rope_type": "default"}
    described = {
        "architectures": [FAMILIES[family][0]],
        "model_type": family,
        "hidden_act": "silu",
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        "rope_theta": config.rope_theta,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
    }
    if config.num_experts:
        described |= {name: getattr(config, name) for name in MOE_FIELDS}
        described |= {"decoder_sparse_step": 1, "mlp_only_layers": list(config.mlp_only_layers)}
    if config.rope_scaling:
        described["rope_scaling"] = scaling  # where readers of before transformers 5 look
    return described


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
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: there is no config.json, so this is not a Hugging Face model folder.")
    raw = read_json(folder / "config.json")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{folder}: model_type is {family!r}; supported are {', '.join(sorted(FAMILIES))}.")
    if raw.get("quantization_config"):
        raise ValueError(f"{folder}: config.json has a quantization_config; quantised weights are not supported.")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported.")
    if raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or []):
        raise ValueError(f"{folder}: config.json asks for sliding-window attention, which is not supported.")
    optional = ("num_key_value_heads", "head_dim", "tie_word_embeddings")
    lacking = [name for name in SHARED_FIELDS if name not in optional and raw.get(name) is None]
    if lacking:
        raise ValueError(f"{folder}: config.json does not say {', '.join(lacking)}.")
    for name in SHARED_FIELDS[:-2]:
        if not isinstance(raw.get(name, 0), int | None) or isinstance(raw.get(name), bool):
            raise ValueError(f"{folder}: {name} is {raw[name]!r}; it must be a whole number.")
    heads = raw["num_attention_heads"]
    head_dim = 128 if family == "qwen3" else raw["hidden_size"] // max(1, heads)  # where the file is silent, as in transformers
    defaults = {"num_key_value_heads": heads, "head_dim": head_dim, "tie_word_embeddings": False}
    fields = {name: raw[name] if raw.get(name) is not None else defaults[name] for name in SHARED_FIELDS}
    switches = {**FAMILIES[family][1], **(read_mixture(raw, folder) if family == "qwen3_moe" else {})}
    if raw.get("attention_bias"):
        raise ValueError(f"{folder}: attention_bias is set, and {family} is supported without it.")
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    try:
        scaling = RopeScaling.read(rope, fields["max_position_embeddings"])
        return DecoderConfig(**fields, **switches, rope_theta=10_000.0 if theta is None else float(theta), rope_scaling=scaling)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def read_mixture(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a mixture of experts; layers that `decoder_sparse_step` skips are named one by one."""
    raw = {"num_experts": raw.get("num_local_experts"), **raw}  # transformers 5 writes it so
    lacking = [name for name in MOE_FIELDS[:3] if not isinstance(raw.get(name), int)]
    if lacking:
        raise ValueError(f"{folder}: config.json does not say {', '.join(lacking)} as whole numbers.")
    step, layers = raw.get("decoder_sparse_step") or 1, range(raw["num_hidden_layers"])
    dense = {layer for layer in layers if (layer + 1) % step} | set(raw.get("mlp_only_layers") or [])
    fields = {name: raw[name] for name in MOE_FIELDS[:3]}
    return {**fields, "norm_topk_prob": bool(raw.get("norm_topk_prob")), "mlp_only_layers": tuple(sorted(dense))}


def stop_token_ids(folder: Path) -> list[int]:
    """The EOS ids that generation_config.json, or else config.json, names."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            eos = read_json(folder / name).get("eos_token_id")
            if eos is not None:
                return list(eos) if isinstance(eos, list) else [eos]
    raise ValueError(f"{folder}: neither generation_config.json nor config.json names an eos_token_id, so no completion could ever end.")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object, but {type(value).__name__}.")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}, indent=2) + "\n")
