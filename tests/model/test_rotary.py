"""Scaled rotary embeddings are those of transformers: the frequencies, whole models loaded from it, and models that it loads from us."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bcr.model import Decoder, load_pretrained, save_pretrained
from bcr.model.attention import PackedAttention
from bcr.model.rotary import RopeScaling, frequencies

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {**LLAMA31, "original_max_position_embeddings": 64},
    "yarn": YARN,
    "yarn, all its keys": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False},
    "yarn, as DeepSeek": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
}
TOKENS = torch.randint(97, (200,), generator=torch.Generator().manual_seed(1))

POSITIVE = st.floats(0.25, 64.0)
MAYBE = st.none() | POSITIVE


@st.composite
def rope_parameters(draw: st.DrawFn) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": draw(st.sampled_from(["linear", "llama3", "yarn"])), "factor": draw(st.floats(1.0, 64.0))}
    if fields["rope_type"] != "linear":
        fields["original_max_position_embeddings"] = draw(st.integers(16, 32768))
    if fields["rope_type"] == "llama3":
        low = draw(st.floats(0.25, 8.0))
        fields |= {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.25, 8.0))}
    if fields["rope_type"] == "yarn":
        options = {"attention_factor": MAYBE, "mscale": MAYBE, "mscale_all_dim": MAYBE, "truncate": st.none() | st.booleans()}
        fields |= {name: draw(values) for name, values in options.items()}
        slow = draw(st.none() | st.floats(0.5, 4.0))
        fields |= {"beta_slow": slow, "beta_fast": None if slow is None else slow + draw(st.floats(0.5, 40.0))}
    return {name: value for name, value in fields.items() if value is not None}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rope_parameters(), st.sampled_from([16, 64, 128]), st.sampled_from([100.0, 10_000.0, 500_000.0, 5_000_000.0]))
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], head_dim: int, theta: float) -> None:
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=65536, rope_parameters={**rope, "rope_theta": theta})
    theirs, their_magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    scaling = RopeScaling.read(rope, 65536)
    assert scaling is not None
    ours, magnitude = frequencies(head_dim, theta, scaling)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-5, atol=0)
    assert magnitude == pytest.approx(their_magnitude, rel=1e-9)
    assert RopeScaling.read(scaling.fields(), 1) == scaling


@torch.no_grad()
def logits(model: Decoder) -> Tensor:
    hidden = model(TOKENS, torch.arange(len(TOKENS)), PackedAttention([len(TOKENS)], torch.device("cpu")))
    return hidden @ model.head_weight.T


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("case", SCALINGS)
@torch.no_grad()
def test_both_ways(family: Any, case: str, tmp_path: Path, make_decoder) -> None:
    """transformers -> us -> transformers on positions far beyond the original context, and the scaling is felt."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {**SCALINGS[case], "rope_theta": 1000.0}
    torch.manual_seed(0)
    peer = AutoModelForCausalLM.from_config(
        family(**sizes, num_key_value_heads=2, max_position_embeddings=256, rope_parameters=rope)
    ).eval()
    for parameter in peer.parameters():
        parameter.mul_(8.0 if parameter.dim() == 2 else 1.3)
    peer.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    theirs = peer(TOKENS[None]).logits[0]
    assert theirs.std() > 0.5
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-4)
    save_pretrained(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.config.rope_parameters.items() >= rope.items()
    torch.testing.assert_close(again(TOKENS[None]).logits[0], theirs, rtol=0, atol=1e-6)
    model.rotary.scaling, model.rotary.table = None, None
    assert (logits(model) - theirs).abs().max() > 0.01


@pytest.mark.parametrize(
    ("rope", "sentence"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "RoPE scaling 'dynamic' is not supported; supported are linear, llama3, yarn"),
        ({"type": "longrope", "factor": 2.0}, "RoPE scaling 'longrope' is not supported"),
        ({"type": "linear"}, "'linear' has factor = None"),
        ({"rope_type": "linear", "factor": "two"}, "'linear' has factor = 'two'"),
        ({**LLAMA31, "high_freq_factor": None}, "'llama3' has high_freq_factor = None"),
        ({**LLAMA31, "low_freq_factor": 4.0}, "low_freq_factor = 4.0, which must be below"),
        ({**YARN, "factor": 0.0}, "'yarn' has factor = 0.0"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_is_not_supported_is_named(rope: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RopeScaling.read(rope, 4096)


def test_yarn_without_a_factor_takes_the_ratio_of_the_contexts() -> None:
    scaling = RopeScaling.read({"type": "yarn", "original_max_position_embeddings": 1024}, 4096)
    assert scaling == RopeScaling("yarn", 4.0, 1024)
