"""Checkpoints go to transformers and come back unchanged, and what cannot be loaded is refused in one sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bcr.model import Decoder, DecoderConfig, load_pretrained, save_pretrained
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_shards_that_we_write_load_here_and_in_transformers(tied: bool, dtype: torch.dtype, tmp_path: Path, make_decoder) -> None:
    """Saved over a checkpoint in one file, and one file saved over shards again: nothing of the earlier one is read."""
    model, other = (make_decoder(seed=seed, tie_word_embeddings=tied, qkv_bias=False).to(dtype) for seed in (0, 1))
    save_pretrained(other, tmp_path, eos_token_id=2)
    save_pretrained(model, tmp_path, eos_token_id=2, shard_bytes=30_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 60_000  # q, k, v stay together, and gate, up
    for saved in (model, other):
        assert torch.equal(logits(load_pretrained(tmp_path, dtype=dtype)), logits(saved))
        peer = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert peer.dtype == dtype
        theirs = peer.float()(TOKENS[None]).logits[0]
        torch.testing.assert_close(logits(load_pretrained(tmp_path)), theirs, rtol=0, atol=1e-4)
        save_pretrained(other, tmp_path, eos_token_id=2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("shard_bytes", "dtype"), [(10**9, "float32"), (60_000_000, "bfloat16")])
def test_loading_needs_no_second_copy(shard_bytes: int, dtype: str, tmp_path: Path, make_decoder) -> None:
    """200 MB in float32, the largest tensor 25 MB: the peak grows by the weights, 64 MB of a mapped file and a tensor."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12}
    config = DecoderConfig(**{**vars(make_decoder().config), **sizes, "vocab_size": 8000, "num_key_value_heads": 4, "head_dim": 64})
    save_pretrained(Decoder(config), tmp_path, shard_bytes=shard_bytes)
    save_pretrained(make_decoder(), tmp_path / "tiny")
    program = Path(__file__).with_name("loading_memory.py")
    shown = subprocess.run([sys.executable, program, tmp_path, dtype], capture_output=True, text=True, check=True, env=environment())
    growth, weights = map(int, shown.stdout.split())
    assert weights == 4 * 50_047_488 // (1 if dtype == "float32" else 2)
    assert 0.95 * weights < growth < weights + 64_000_000 + 25_000_000


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


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


@torch.no_grad()
def test_what_came_with_a_checkpoint_leaves_with_it(tmp_path: Path) -> None:
    """A Qwen2-shaped checkpoint with chat template, generation defaults and keys that we do not know: all of it is there again."""
    vocabulary = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, **{word: 3 + i for i, word in enumerate("abcu")}}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template)
    tokenizer.save_pretrained(tmp_path / "theirs")
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(**sizes, num_key_value_heads=1, dtype="bfloat16", max_window_layers=17, attention_dropout=0.125)
    peer = Qwen2ForCausalLM(config).to(torch.bfloat16)
    peer.generation_config = GenerationConfig(eos_token_id=[2, 0], bos_token_id=0, do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    peer.save_pretrained(tmp_path / "theirs")

    model = load_pretrained(tmp_path / "theirs")
    stops = stop_token_ids(tmp_path / "theirs")
    (tmp_path / "theirs").rename(tmp_path / "moved")  # nothing of it is needed any more
    save_pretrained(model, tmp_path / "ours", eos_token_id=stops)
    chat = [{"role": "user", "content": "a b"}, {"role": "user", "content": "c"}]
    again = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again.chat_template == template
    assert again.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert again("a c u").input_ids == tokenizer("a c u").input_ids == [3, 5, 6]
    generation = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert generation.to_diff_dict() == GenerationConfig.from_pretrained(tmp_path / "moved").to_diff_dict()
    assert (generation.eos_token_id, generation.temperature, generation.top_k) == ([2, 0], 0.6, 20)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (loaded.dtype, loaded.config.max_window_layers, loaded.config.attention_dropout) == (torch.float32, 17, 0.125)
    assert loaded.config.dtype == torch.float32  # the model was loaded, and so saved, in it
    for mine, theirs in zip(loaded.parameters(), peer.parameters(), strict=True):
        assert torch.equal(mine.to(torch.bfloat16), theirs)


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
    "architecture": (configure(model_type="mamba"), "model_type is 'mamba'; supported are llama, qwen2, qwen3, qwen3_moe"),
    "no architecture": (configure(model_type="absent"), "model_type is None"),
    "rope scaling": (configure(rope_parameters="absent", rope_scaling={"type": "dynamic", "factor": 4.0}), "RoPE scaling 'dynamic'"),
    "rope parameters": (configure(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "RoPE scaling 'llama3'"),
    "quantised": (configure(quantization_config={"quant_method": "fp8"}), "quantised weights are not supported"),
    "quantised tensor": (
        lambda folder: change_weights(folder, lambda state: state.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})),
        "'norm.weight' is stored as I8; quantised weights",
    ),
    "size of the wrong type": (configure(hidden_size="64"), "hidden_size is '64'; it must be a whole number"),
    "config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json is no JSON object"),
    "index of nothing": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "index.json is no index of shards"),
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
