"""Contract 3, on weights with 0.5 to 3 nats of entropy: trainer at batch m = at batch n, trainer forward = prefill, decode = re-prefill.

With `InvariantAttention` in the trainer all three are exact. With the trainer's usual attention they are no worse than what `transformers`
differs from itself, with a cache and without one.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bcr.model import Decoder, save_pretrained
from bcr.model.attention import PackedAttention
from bcr.model.lora_config import LoraConfig, adapt
from bcr.model.row_attention import InvariantAttention, round_up
from bcr.sampler import Request, Rollout, Sampler, SamplingParams
from bcr_kernels import linear_logprob

CPU = torch.device("cpu")
FAMILIES = {
    "qwen3": {"qk_norm": True, "qkv_bias": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "num_attention_heads": 6, "num_key_value_heads": 1},
    "llama": {"qk_norm": False, "qkv_bias": False, "num_key_value_heads": 4},
}
MODES = [(family, dtype) for family in FAMILIES for dtype in (torch.float32, torch.bfloat16)]
LENGTHS = [1, 4, 9, 17, 33, 60, 100, 150]
PARAMS = SamplingParams(0.9, n=2, stop_token_ids=(96,), seed=1)


def requests_of(lengths: Sequence[int], new: int, seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    return [Request(f"r{k}", torch.randint(0, 96, (length,), generator=generator).tolist(), new) for k, length in enumerate(lengths)]


@torch.no_grad()
def trainer_logprobs(model: Decoder, pack: Sequence[tuple[list[int], Rollout]], attention: type) -> list[list[float]]:
    """Log-probs of the rollouts of a pack, as the learner computes them: one forward over all, its own log-prob."""
    sequences = [torch.tensor([*prompt, *rollout.token_ids]) for prompt, rollout in pack]
    tokens = torch.cat(sequences)
    padding = torch.zeros(round_up(len(tokens), 16) - len(tokens) if attention is InvariantAttention else 0, dtype=torch.int64)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    lengths = [len(sequence) for sequence in sequences]
    hidden = model(torch.cat([tokens, padding]), torch.cat([positions, padding]), attention(lengths, CPU))
    targets = torch.cat([tokens[1:], tokens[:1], padding])
    found = linear_logprob(hidden, model.head_weight, targets, temperature=PARAMS.temperature, with_entropy=True)
    assert found.entropy is not None
    assert 0.4 < float(found.entropy[: len(tokens)].mean()) < 3.2
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [found.logprob[end - len(rollout.token_ids) - 1 : end - 1].tolist() for end, (_, rollout) in zip(ends, pack, strict=True)]


@pytest.mark.parametrize(("family", "dtype"), MODES)
def test_exact_with_invariant_attention(family: str, dtype: torch.dtype, make_decoder) -> None:
    """Mixed batches, chunks and decoding in the sampler; packs of every size in the trainer: one set of log-probs, bit for bit."""
    is_exact(make_decoder(max_position_embeddings=512, **FAMILIES[family]).to(dtype))


@pytest.mark.parametrize(("dtype", "targets"), [(torch.float32, None), (torch.float32, ["q_proj", "down_proj"]), (torch.bfloat16, None)])
def test_exact_with_low_rank_adapters(dtype: torch.dtype, targets: list[str] | None, make_decoder) -> None:
    model = adapt(make_decoder(max_position_embeddings=512).to(dtype), LoraConfig(rank=5, targets=targets), None, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    is_exact(model)


def is_exact(model: Decoder) -> None:
    requests = requests_of([*LENGTHS, 330], 40)
    groups = Sampler(model, max_batch=7, step_tokens=50).generate(requests, PARAMS)
    pack = [(request.prompt_ids, rollout) for request, group in zip(requests, groups, strict=True) for rollout in group]
    sampled = [rollout.logprobs for _, rollout in pack]
    assert trainer_logprobs(model, pack, InvariantAttention) == sampled
    assert [trainer_logprobs(model, [one], InvariantAttention)[0] for one in pack] == sampled
    assert trainer_logprobs(model, pack[::-1], InvariantAttention)[::-1] == sampled
    again = [Request(r.request_id, [*prompt, *r.token_ids[:-1]], 1) for prompt, r in pack[:: PARAMS.n]]  # decoded before, prefilled now
    for request, (_, before), (after,) in zip(
        again, pack[:: PARAMS.n], Sampler(model).generate(again, SamplingParams(0.9, 1, (96,), seed=3)), strict=True
    ):
        (expected,) = trainer_logprobs(model, [(request.prompt_ids, after)], InvariantAttention)
        assert after.logprobs == expected
        if after.token_ids[0] == before.token_ids[-1]:
            assert after.logprobs[0] == before.logprobs[-1]


@torch.no_grad()
def transformers_with_itself(peer: PreTrainedModel, pack: Sequence[tuple[list[int], Rollout]]) -> list[float]:
    """|log-prob with a cache, token by token - log-prob of one full forward| of the same rollouts."""
    differences = []
    for prompt, rollout in pack:
        tokens = torch.tensor([[*prompt, *rollout.token_ids]])
        targets, start = tokens[0, len(prompt) :], len(prompt) - 1
        full = torch.log_softmax(peer(tokens).logits[0, start:-1].float() / PARAMS.temperature, -1)
        out = peer(tokens[:, : start + 1], use_cache=True)
        cached = [out.logits[0, -1]]
        for place in range(start + 1, tokens.shape[1] - 1):
            out = peer(tokens[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            cached.append(out.logits[0, -1])
        stepwise = torch.log_softmax(torch.stack(cached).float() / PARAMS.temperature, -1)
        differences += (full - stepwise).gather(1, targets[:, None]).abs().flatten().tolist()
    return differences


@pytest.mark.parametrize(("family", "dtype"), MODES)
def test_no_worse_than_transformers_with_itself(family: str, dtype: torch.dtype, make_decoder, tmp_path: Path) -> None:
    model = make_decoder(tie_word_embeddings=family == "qwen3", **FAMILIES[family]).to(dtype)
    save_pretrained(model, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    requests = requests_of(LENGTHS, 40)
    groups = Sampler(model).generate(requests, PARAMS)
    pack = [(request.prompt_ids, rollout) for request, group in zip(requests, groups, strict=True) for rollout in group]
    expected = trainer_logprobs(model, pack, PackedAttention)
    ours = [abs(a - b) for row, (_, rollout) in zip(expected, pack, strict=True) for a, b in zip(row, rollout.logprobs, strict=True)]
    theirs = transformers_with_itself(peer, pack)
    assert len(ours) == len(theirs) > 200
    assert sum(ours) <= sum(theirs)


@torch.no_grad()
def test_greedy_text_over_64_prompts_of_very_different_lengths(make_decoder, tmp_path: Path) -> None:
    """Equal to `transformers.generate` in float32 but for ties: a first difference counts as one where the two logits are within 1e-4."""
    model = make_decoder(seed=3)
    save_pretrained(model, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    requests = requests_of([1 + (k * k * 7) % 180 for k in range(64)], 16, seed=4)
    groups = Sampler(model).generate(requests, SamplingParams(0.0, stop_token_ids=(96,)))
    ties = 0
    for request, (rollout,) in zip(requests, groups, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        mask = torch.ones_like(prompt)
        out = peer.generate(prompt, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=96, pad_token_id=0)
        theirs = out[0, len(request.prompt_ids) :].tolist()
        if rollout.token_ids != theirs:
            first = next(k for k, pair in enumerate(zip(rollout.token_ids, theirs, strict=False)) if pair[0] != pair[1])
            logits = peer(torch.tensor([[*request.prompt_ids, *theirs[:first]]])).logits[0, -1]
            assert abs(float(logits[theirs[first]] - logits[rollout.token_ids[first]])) < 1e-4
            ties += 1
    assert ties <= 2
