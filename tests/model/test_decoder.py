"""The decoder computes what transformers computes with the same weights, alone or packed, and is exact in float64."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bcr.model import Decoder, DecoderConfig, load_pretrained
from bcr.model.attention import PackedAttention

CPU = torch.device("cpu")
FAMILIES = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
VOCABULARY = 101


def peer_model(family: str, *, heads: int = 4, kv_heads: int = 2, tied: bool = False, theta: float = 10_000.0) -> PreTrainedModel:
    """A small transformers model with random weights, norms and biases, and logits of ordinary size."""
    config_class, model_class = FAMILIES[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=16 * heads if family != "qwen3" else 48,  # Qwen3's heads need not divide the hidden size
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    torch.manual_seed(7)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2.0 / config.hidden_size**0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


def same_weights(peer: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    peer.save_pretrained(folder)
    return load_pretrained(folder, dtype=dtype)


def random_sequences(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def packed_logits(model: Decoder, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Logits [length,V] of each sequence, all of them in one packed forward pass."""
    lengths = [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = model(torch.cat(list(sequences)), positions, PackedAttention(lengths, CPU))
    return list((hidden @ model.head_weight.T).split(lengths))


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("heads", "kv_heads", "tied"), [(4, 4, False), (4, 2, True), (6, 2, False), (4, 1, True)])
@torch.no_grad()
def test_logits_equal_transformers(family: str, heads: int, kv_heads: int, tied: bool, tmp_path: Path) -> None:
    peer = peer_model(family, heads=heads, kv_heads=kv_heads, tied=tied)
    model = same_weights(peer, tmp_path)
    assert (model.lm_head is None) == tied
    sequences = random_sequences([7, 1, 33, 8, 120, 2])
    theirs = [peer(sequence[None]).logits[0] for sequence in sequences]
    assert 1.0 < torch.cat(theirs).std() < 3.0
    assert largest_difference(packed_logits(model, sequences), theirs) <= 1e-4


@pytest.mark.parametrize("theta", [100.0, 1_000_000.0])
@torch.no_grad()
def test_rope_base_and_positions_equal_transformers(theta: float, tmp_path: Path) -> None:
    peer = peer_model("qwen3", theta=theta)
    model = same_weights(peer, tmp_path)
    (sequence,) = random_sequences([20])
    positions = torch.tensor([0, 1, 5, 6, 7, 9, 30, 31, 32, 40, 41, 60, 61, 62, 63, 80, 90, 91, 100, 400])
    theirs = peer(sequence[None], position_ids=positions[None], attention_mask=torch.ones(1, 20)).logits[0]
    hidden = model(sequence, positions, PackedAttention([20], CPU))
    assert largest_difference([hidden @ model.head_weight.T], [theirs]) <= 1e-4
    in_a_row = packed_logits(model, [sequence])
    assert largest_difference(in_a_row, [theirs]) > 0.1  # positions count
    shifted = model(sequence, torch.arange(20) + 77, PackedAttention([20], CPU)) @ model.head_weight.T
    assert largest_difference(in_a_row, [shifted]) <= 1e-4  # and only their differences do


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_is_each_sequence_alone(family: str, tmp_path: Path) -> None:
    model = same_weights(peer_model(family), tmp_path, torch.float64)
    sequences = random_sequences([5, 40, 1, 41, 6, 5, 100, 44])
    alone = [packed_logits(model, [sequence])[0] for sequence in sequences]
    assert largest_difference(packed_logits(model, sequences), alone) <= 1e-12
    backwards = packed_logits(model, sequences[::-1])[::-1]
    assert largest_difference(backwards, alone) <= 1e-12


def test_no_gradient_crosses_sequences_or_runs_back_in_time(make_decoder) -> None:
    """The sequences use different tokens, so the rows of the embedding tell from where a logit was made."""
    model = make_decoder()
    sequences = [torch.arange(0, 9), torch.arange(20, 30), torch.arange(40, 49), torch.arange(60, 90)]
    logits = packed_logits(model, sequences)
    for number, time in [(0, 8), (1, 4), (2, 0), (3, 17)]:
        (gradient,) = torch.autograd.grad(logits[number][time].square().sum(), model.embed_tokens.weight, retain_graph=True)
        reached = gradient.abs().sum(dim=1).nonzero().squeeze(1).tolist()
        assert reached == sequences[number][: time + 1].tolist()


def test_float64_is_exact_enough_for_finite_differences(make_decoder) -> None:
    """A central difference along a random direction equals the gradient to 1e-7: nothing inside drops to float32."""
    model = make_decoder(qkv_bias=True).double()
    sequences = [torch.arange(0, 9), torch.arange(20, 26)]

    def loss() -> Tensor:
        return torch.cat(packed_logits(model, sequences)).log_softmax(-1)[:, 5].sum()

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    generator = torch.Generator().manual_seed(0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        direction, step, start = torch.randn(parameter.shape, generator=generator, dtype=torch.float64), 1e-5, parameter.detach().clone()
        with torch.no_grad():
            ends = [float((parameter.copy_(start + sign * step * direction), loss())[1]) for sign in (1, -1)]
            parameter.copy_(start)
        expected = float((gradient * direction).sum())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@torch.no_grad()
def test_bfloat16_errs_no_more_than_transformers(tmp_path: Path) -> None:
    peer = peer_model("qwen3")
    sequences = random_sequences([7, 33, 120])
    exact = packed_logits(same_weights(peer, tmp_path), sequences)
    ours = packed_logits(load_pretrained(tmp_path, dtype=torch.bfloat16), sequences)
    half = peer.to(torch.bfloat16)
    theirs = [half(sequence[None]).logits[0] for sequence in sequences]
    assert ours[0].dtype == torch.bfloat16

    def mean_error(logits: Sequence[Tensor]) -> float:
        return float((torch.cat(list(logits)).float() - torch.cat(exact)).abs().mean())

    assert 0 < mean_error(ours) <= 1.25 * mean_error(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_give_the_same_gradients_and_are_not_kept(dtype: torch.dtype, make_decoder) -> None:
    model, found = make_decoder(num_hidden_layers=4).to(dtype), []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = torch.cat(packed_logits(model, [torch.arange(40), torch.arange(30)])).float().log_softmax(-1)[:, 5].sum()
        during_forward = sum(kept)
        found.append((during_forward, torch.autograd.grad(loss, list(model.parameters()))))
    (all_of_it, plain), (few, recomputed) = found
    assert few < 0.3 * all_of_it
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


@torch.no_grad()
def test_logits_of_bfloat16_weights_are_not_rounded(make_decoder) -> None:
    model = make_decoder().to(torch.bfloat16)
    hidden = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = hidden.double() @ model.head_weight.double().T
    assert model.logits(hidden).dtype == torch.float32
    torch.testing.assert_close(model.logits(hidden).double(), exact, rtol=0, atol=1e-4)
    assert (hidden @ model.head_weight.T - exact).abs().max() > 1e-2


def test_initial_weights_are_a_function_of_the_seed(make_decoder) -> None:
    config = make_decoder(qkv_bias=True, hidden_size=128).config
    first, again, other = Decoder(config).init_weights(1), Decoder(config).init_weights(1), Decoder(config).init_weights(2)
    for (name, weight), same, different in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same)
        if weight.dim() == 2:
            assert not torch.equal(weight, different)
            expected = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # 0.02 / sqrt(2 * 2 layers)
            assert float(weight.detach().std()) == pytest.approx(expected, rel=0.05)
        else:
            assert bool((weight == (0.0 if name.endswith("bias") else 1.0)).all())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, which is no multiple of num_key_value_heads = 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ],
)
def test_impossible_sizes_are_named(change: dict[str, int], sentence: str, make_decoder) -> None:
    with pytest.raises(ValueError, match=sentence):
        DecoderConfig(**{**vars(make_decoder().config), **change})
