"""Mixtures of experts are those of transformers: loaded from it, loaded by it, differentiated, sampled and evaluated."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bcr.evaluate import evaluate, prepare
from bcr.model import Decoder, load_pretrained, save_pretrained
from bcr.model.attention import PackedAttention
from bcr.model.experts import MixtureOfExperts
from bcr.model.mlp import SwiGLU
from bcr.records import Request
from bcr.runtime.checkpoint import save_checkpoint
from bcr.runtime.config import compose
from bcr.runtime.schema import EvaluateConfig
from bcr.sampler import Sampler, SamplingParams
from bcr.tasks.arithmetic import build_tokenizer

TOKENS = torch.randint(97, (60,), generator=torch.Generator().manual_seed(1))


def peer_model(**changes: object) -> PreTrainedModel:
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    settings = {**sizes, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, **experts, **changes}
    torch.manual_seed(0)
    peer = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=2.0 / 64**0.5) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return peer


def logits(model: Decoder) -> Tensor:
    hidden = model(TOKENS, torch.arange(len(TOKENS)), PackedAttention([len(TOKENS)], torch.device("cpu")))
    return hidden @ model.head_weight.T


@pytest.mark.parametrize(
    "changes", [{}, {"norm_topk_prob": False, "num_experts_per_tok": 3}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}]
)
def test_both_ways_with_gradients(changes: dict[str, object], tmp_path: Path) -> None:
    peer = peer_model(**changes)
    peer.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    ours, theirs = logits(model), peer(TOKENS[None]).logits[0]
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    for each in (ours, theirs):
        each.log_softmax(-1)[:, 5].mean().backward()
    torch.testing.assert_close(model.embed_tokens.weight.grad, peer.model.embed_tokens.weight.grad, rtol=0, atol=1e-4)
    router = next(layer.mlp.gate for layer in model.layers if isinstance(layer.mlp, MixtureOfExperts))
    their_router = next(layer.mlp.gate for layer in peer.model.layers if hasattr(layer.mlp, "gate"))
    assert router.weight.grad.norm() > 0
    torch.testing.assert_close(router.weight.grad, their_router.weight.grad, rtol=0, atol=1e-4)
    save_pretrained(model, tmp_path / "ours", eos_token_id=3)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(again(TOKENS[None]).logits[0], theirs, rtol=0, atol=1e-5)
    assert load_pretrained(tmp_path / "ours").config == model.config


def test_layers_are_dense_where_the_config_says_so(tmp_path: Path) -> None:
    peer_model(mlp_only_layers=[0], decoder_sparse_step=2).save_pretrained(tmp_path)
    kinds = [type(layer.mlp) for layer in load_pretrained(tmp_path).layers]
    assert kinds == [SwiGLU, MixtureOfExperts, SwiGLU, MixtureOfExperts]


def test_it_samples_what_its_forward_says(tmp_path: Path) -> None:
    """Greedy rollouts are the argmax of the packed forward, and the log-probs agree."""
    peer_model().save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    requests = [Request(str(number), TOKENS[number : number + 5].tolist(), 8) for number in range(3)]
    groups = Sampler(model, row_block=8).generate(requests, SamplingParams(temperature=0.0, n=1, stop_token_ids=(96,)))
    for request, (rollout,) in zip(requests, groups, strict=True):
        ids = torch.tensor([*request.prompt_ids, *rollout.token_ids])
        with torch.no_grad():
            hidden = model(ids, torch.arange(len(ids)), PackedAttention([len(ids)], ids.device))
            table = (hidden @ model.head_weight.T).log_softmax(-1)[4:-1]
        assert table.argmax(-1).tolist() == list(rollout.token_ids)
        torch.testing.assert_close(table.amax(-1), torch.tensor(rollout.logprobs), rtol=0, atol=1e-4)


def test_it_is_evaluated(tmp_path: Path) -> None:
    """`bcr.evaluate` on a mixture with the embedded world's words: every problem gets a verdict."""
    tokenizer = build_tokenizer()
    peer_model(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=512).save_pretrained(tmp_path / "theirs")
    save_checkpoint(load_pretrained(tmp_path / "theirs"), tokenizer, (tokenizer.token_to_id("<eos>"),), tmp_path / "ours", "")
    few = ["device=cpu", "problems=6", "sizes=[1,3]", "budgets=[40]", "budgets_per_problem=[]", "sampling.row_block=8"]
    config = compose("evaluate", [*few, "model=folder", f"model.path={tmp_path / 'ours'}"], EvaluateConfig)
    cells = evaluate(prepare(config))
    assert [cell["n"] for cell in cells] == [1, 3]
    for cell in cells:
        assert cell["problems"] == 6
        assert cell["tokens_per_problem"] > 0
        verdicts = ("accuracy", "wrong", "unanswered", "unparsed", "timeout", "error")
        assert sum(cell[verdict] for verdict in verdicts) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; it must be from 1 to num_experts = 6"),
        ({"moe_intermediate_size": None}, "does not say moe_intermediate_size"),
        ({"num_experts": 7}, r"lack the tensor 'layers.0.mlp.experts.6.down_proj.weight'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    save_pretrained(decoder(tmp_path), tmp_path / "ours")
    raw = json.loads((tmp_path / "ours" / "config.json").read_text()) | change
    (tmp_path / "ours" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=sentence):
        load_pretrained(tmp_path / "ours")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    save_pretrained(decoder(tmp_path), tmp_path / "ours")
    state = load_file(tmp_path / "ours" / "model.safetensors")
    del state["model.layers.2.mlp.experts.4.up_proj.weight"]
    save_file(state, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lack the tensor 'layers.2.mlp.experts.4.up_proj.weight'"):
        load_pretrained(tmp_path / "ours")


def decoder(folder: Path) -> Decoder:
    peer_model().save_pretrained(folder / "theirs")
    return load_pretrained(folder / "theirs")
