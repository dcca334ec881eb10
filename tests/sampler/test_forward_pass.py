"""Log-probs are those of the decoder's own forward pass, and greedy text is that of transformers."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from bcr.sampler import Request, Sampler, SamplingParams
from tests.sampler.cases import STOPS, as_transformers, forward_logprobs, make_requests


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_logprobs_are_those_of_the_forward_pass(temperature: float, tied: bool, tmp_path: Path, make_decoder) -> None:
    """Within 1e-5 / temperature at an entropy of 0.5 to 3 nats.

    And no worse than twice what transformers, with a cache, differs from itself without one.
    """
    model = make_decoder(tie_word_embeddings=tied)
    requests = make_requests([1, 4, 9, 17, 33, 60, 100, 150], [40] * 8)
    params = SamplingParams(temperature, n=2, stop_token_ids=STOPS, seed=1)
    differences, entropies = [], []
    for request, group in zip(requests, Sampler(model).generate(requests, params), strict=True):
        for rollout in group:
            expected, entropy = forward_logprobs(model, request.prompt_ids, rollout.token_ids, temperature)
            differences += [abs(a - b) for a, b in zip(rollout.logprobs, expected, strict=True)]
            entropies.append(entropy)
    assert 0.5 < sum(entropies) / len(entropies) < 3.0
    assert len(differences) > 200
    assert max(differences) <= 1e-5 / temperature
    theirs = transformers_with_itself(as_transformers(model, tmp_path), requests, temperature)
    assert sum(differences) / len(differences) <= 2 * sum(theirs) / len(theirs)
    assert max(differences) <= 2 * max(theirs)


@torch.no_grad()
def transformers_with_itself(peer: PreTrainedModel, requests: Sequence[Request], temperature: float) -> list[float]:
    """|log-prob in generate with a cache - log-prob in one full forward pass| of every token that transformers samples."""
    differences: list[float] = []
    torch.manual_seed(0)
    for request in requests:
        out = peer.generate(
            torch.tensor([request.prompt_ids]).expand(2, -1),
            attention_mask=torch.ones(2, len(request.prompt_ids), dtype=torch.int64),
            max_new_tokens=request.max_new_tokens,
            do_sample=True,
            top_k=0,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        start, tokens = len(request.prompt_ids), out.sequences
        full = peer(tokens).logits[:, start - 1 : -1]
        cached = torch.stack(out.logits, dim=1)
        assert full.shape == cached.shape
        sides = [torch.log_softmax(x.float() / temperature, -1).gather(2, tokens[:, start:, None]) for x in (cached, full)]
        differences += (sides[0] - sides[1]).abs().flatten().tolist()
    return differences


@torch.no_grad()
def test_greedy_text_equals_transformers(tmp_path: Path, make_decoder) -> None:
    model = make_decoder(seed=3)
    peer = as_transformers(model, tmp_path)
    requests = make_requests([1, 2, 3, 5, 8, 13, 15, 16, 17, 21, 32, 34, 55, 89, 120, 144], [20] * 16)
    groups = Sampler(model).generate(requests, SamplingParams(0.0, stop_token_ids=STOPS))
    for request, (rollout,) in zip(requests, groups, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        out = peer.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=list(STOPS), pad_token_id=0
        )
        assert rollout.token_ids == out[0, len(request.prompt_ids) :].tolist()
        expected, _ = forward_logprobs(model, request.prompt_ids, rollout.token_ids)
        assert rollout.logprobs == pytest.approx(expected, abs=1e-5)
    assert len({tuple(rollout.token_ids) for (rollout,) in groups}) > 10
