"""Checkpoints go to transformers and come back unchanged, and what cannot be loaded is refused in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config, Qwen3ForCausalLM

from bcr.model import Decoder, load_pretrained, save_pretrained
from bcr.model.attention import PackedAttention
from bcr.model.huggingface import read_config, resolve, stop_token_ids

SWITCHES = {
    "qwen3": {"qk_norm": True, "qkv_bias": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "llama": {"qk_norm": False, "qkv_bias": False},
}
TOKENS = torch.tensor([5, 96, 0, 17, 17, 3, 42, 8, 60, 1])


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    hidden = model(TOKENS, torch.arange(len(TOKENS)), PackedAttention([len(TOKENS)], torch.device("cpu")))
    return hidden @ model.head_weight.T


@pytest.mark.parametrize("family", SWITCHES)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_transformers_loads_what_we_save(family: str, tied: bool, tmp_path: Path, make_decoder) -> None:
    model = make_decoder(head_dim=12, rope_theta=5000.0, rms_norm_eps=1e-5, tie_word_embeddings=tied, **SWITCHES[family])
    save_pretrained(model, tmp_path / "new" / "folder", eos_token_id=2)
    peer, report = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert peer.config.model_type == family
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = peer(TOKENS[None]).logits[0]
    assert 1 < theirs.std() < 4
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-4)
    assert ("lm_head.weight" in load_file(tmp_path / "new" / "folder" / "model.safetensors")) == (not tied)


@pytest.mark.parametrize("family", SWITCHES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_we_save_we_load_bit_for_bit(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path, make_decoder) -> None:
    model = make_decoder(tie_word_embeddings=tied, **SWITCHES[family]).to(dtype)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, dtype=dtype)
    assert loaded.config == model.config
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) and tensor.dtype == dtype for name, tensor in loaded.state_dict().items())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())
    assert (loaded.head_weight is loaded.embed_tokens.weight) == tied
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("family", [Qwen3Config, Qwen2Config, LlamaConfig])
@torch.no_grad()
def test_we_load_what_transformers_saves_with_its_own_defaults(family: Callable[..., Any], shards: int, tmp_path: Path) -> None:
    """Everything that a small model need not set is left to transformers: head size, theta, epsilon, context."""
    config = family(vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    peer = AutoModelForCausalLM.from_config(config).eval()
    for parameter in peer.parameters():
        parameter.mul_(8.0 if parameter.dim() == 2 else 1.3)
    peer.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "40KB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards > 1)
    model = load_pretrained(tmp_path)
    assert model.config.max_position_embeddings == config.max_position_embeddings
    theirs = peer(TOKENS[None]).logits[0]
    assert theirs.std() > 0.5
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-4)


def test_a_head_that_is_stored_although_tied_is_ignored(tmp_path: Path, make_decoder) -> None:
    model = make_decoder(tie_word_embeddings=True)
    save_pretrained(model, tmp_path)
    change_weights(tmp_path, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(load_pretrained(tmp_path)), logits(model))


def test_a_model_saved_without_its_prefix_loads(tmp_path: Path, make_decoder) -> None:
    """Backbones saved alone name their tensors without the leading `model.`."""
    model = make_decoder(tie_word_embeddings=True)
    save_pretrained(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert torch.equal(logits(load_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(("eos", "expected"), [(3, [3]), ([3, 9], [3, 9])])
def test_stop_tokens_come_from_the_generation_config(eos: int | list[int], expected: list[int], tmp_path: Path, make_decoder) -> None:
    save_pretrained(make_decoder(), tmp_path, eos_token_id=eos, bos_token_id=1)
    assert stop_token_ids(tmp_path) == expected
    theirs = GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (eos, 1)
    (tmp_path / "generation_config.json").unlink()
    assert stop_token_ids(tmp_path) == expected


def test_a_model_that_could_never_stop_is_refused(tmp_path: Path, make_decoder) -> None:
    save_pretrained(make_decoder(), tmp_path)
    with pytest.raises(ValueError, match="eos_token_id"):
        stop_token_ids(tmp_path)


def change_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value != "absent"}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def put(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda state: state.update({name: torch.zeros(shape)}))


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda state: state.pop(name))


def configure(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "there is no config.json"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config without a size": (configure(num_attention_heads="absent"), "num_attention_heads"),
    "config without vocabulary": (configure(vocab_size=None), "vocab_size"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"there are no weights \(model.safetensors\)"),
    "pickled weights": (pickle_weights, "the weights are pickled"),
    "truncated": (truncate, "model.safetensors is damaged"),
    "empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is damaged"),
    "embedding shape": (put("model.embed_tokens.weight", 97, 63), r"embed_tokens.weight' has shape \(97, 63\).* \(97, 64\)"),
    "query shape": (put("model.layers.1.self_attn.q_proj.weight", 60, 64), r"layers.1.self_attn.q_proj.weight' has shape \(60, 64\)"),
    "key width": (put("model.layers.0.self_attn.k_proj.weight", 32, 63), r"layers.0.self_attn.k_proj.weight' has shape \(32, 63\)"),
    "vocabulary": (configure(vocab_size=98), r"has shape \(97, 64\).* \(98, 64\)"),
    "missing tensor": (drop("model.norm.weight"), "lack the tensor '.*norm.weight'"),
    "missing part": (drop("model.layers.0.mlp.up_proj.weight"), "lack the tensor '.*layers.0.mlp.up_proj.weight'"),
    "missing head": (drop("lm_head.weight"), "lack the tensor 'lm_head.weight'"),
    "missing layer": (configure(num_hidden_layers=3), "lack the tensor '.*layers.2."),
    "unknown tensor": (put("model.layers.0.mlp.router.weight", 4, 64), "hold the tensor '.*mlp.router.weight'"),
    "unexpected bias": (put("model.layers.0.self_attn.q_proj.bias", 64), "hold the tensor '.*q_proj.bias'"),
    "architecture": (configure(model_type="mamba"), "model_type is 'mamba'; supported are llama, qwen2, qwen3"),
    "no architecture": (configure(model_type="absent"), "model_type is None"),
    "rope scaling": (configure(rope_parameters="absent", rope_scaling={"type": "yarn", "factor": 4.0}), "RoPE scaling 'yarn'"),
    "rope parameters": (configure(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "RoPE scaling 'llama3'"),
    "attention bias": (configure(attention_bias=True), "attention_bias"),
    "activation": (configure(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "sliding window": (configure(use_sliding_window=True, sliding_window=8), "sliding"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_gets_one_sentence(case: str, tmp_path: Path, make_decoder) -> None:
    damage, sentence = BROKEN[case]
    save_pretrained(make_decoder(), tmp_path)
    load_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=sentence) as refusal:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    config = Qwen3Config(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path, max_shard_size="40KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"the shard {lost.name} is missing"):
        load_pretrained(tmp_path)


def test_old_and_new_places_of_rope_theta_are_read(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    change_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 321.0}, rope_theta="absent")
    assert read_config(tmp_path).rope_theta == 321.0
    change_config(tmp_path, rope_parameters="absent", rope_theta=123.0)
    assert read_config(tmp_path).rope_theta == 123.0


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=f"model.path is '{path}'"):
        resolve(path)


def test_a_repository_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"model.path is 'org/name': no such folder, .*no network"):
        resolve("org/name")
