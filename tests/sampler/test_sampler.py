"""The sampler gives the same rollouts whatever the batch, the log-probs of the decoder's own forward pass, and transformers' text."""

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from bcr.model import Decoder, save_pretrained
from bcr.model.attention import PackedAttention
from bcr.sampler import Request, Rollout, Sampler, SamplingParams, invariance, runner
from bcr.sampler.batch import Batch
from bcr.sampler.kv_cache import KVCache
from bcr.sampler.scheduler import Chunk

CPU = torch.device("cpu")
VOCABULARY = 97
STOPS = (1, 2, 3)


def make_requests(lengths: Sequence[int], budgets: Sequence[int], seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(f"r{number}", [rng.randrange(VOCABULARY) for _ in range(length)], budget)
        for number, (length, budget) in enumerate(zip(lengths, budgets, strict=True))
    ]


MIXED = make_requests([1, 9, 2, 30, 16, 17, 5, 64, 3, 12, 33, 1, 7], [40, 12, 1, 25, 33, 8, 60, 20, 5, 17, 30, 3, 48])
SAMPLED = SamplingParams(1.0, n=3, stop_token_ids=STOPS, seed=5)


def by_id(groups: Sequence[Sequence[Rollout]]) -> dict[str, list[Rollout]]:
    return {group[0].request_id: list(group) for group in groups}


@torch.no_grad()
def forward_logprobs(model: Decoder, prompt_ids: list[int], token_ids: list[int], temperature: float = 1.0) -> tuple[list[float], float]:
    """Log-probs of a completion from one forward pass over prompt and completion, and the mean entropy [nats] there."""
    tokens = torch.tensor(prompt_ids + token_ids[:-1])
    hidden = model(tokens, torch.arange(len(tokens)), PackedAttention([len(tokens)], CPU))
    logprobs = torch.log_softmax(hidden[len(prompt_ids) - 1 :] @ model.head_weight.T / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    return logprobs.gather(1, torch.tensor(token_ids)[:, None]).squeeze(1).tolist(), float(entropy)


def as_transformers(model: Decoder, folder: Path) -> PreTrainedModel:
    save_pretrained(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("row_block", [8, 32])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_composition_changes_nothing(row_block: int, temperature: float, make_decoder) -> None:
    """Order, company, number of slots: tokens and log-probs stay the same, bit for bit."""
    model = make_decoder()
    params = SamplingParams(temperature, n=3, stop_token_ids=STOPS, seed=5)

    def generate(requests: Sequence[Request], max_batch: int = 256) -> dict[str, list[Rollout]]:
        return by_id(Sampler(model, row_block=row_block, max_batch=max_batch).generate(requests, params))

    whole = generate(MIXED)
    assert list(whole) == [request.id for request in MIXED]
    for max_batch in (1, 5, 8, 24, 33):
        assert generate(MIXED, max_batch) == whole
    for seed in range(4):
        shuffled = random.Random(seed).sample(MIXED, len(MIXED))
        assert generate(shuffled, max_batch=[256, 11][seed % 2]) == whole
        subset = shuffled[: 1 + 3 * seed]
        assert generate(subset) == {request.id: whole[request.id] for request in subset}
    for request in MIXED:
        assert generate([request]) == {request.id: whole[request.id]}


@pytest.mark.parametrize("heads", [(4, 2, 32), (4, 4, 16), (8, 1, 64)])
def test_batch_composition_changes_nothing_beyond_512_cached_tokens(heads: tuple[int, int, int], make_decoder) -> None:
    """Attention kernels work through the cache in blocks of some hundred places; short rows meet rows on both sides of the borders."""
    query, key, size = heads
    model = make_decoder(hidden_size=128, num_attention_heads=query, num_key_value_heads=key, head_dim=size, max_position_embeddings=1200)
    requests = make_requests([500, 1, 505, 30, 1015, 511, 250, 1030], [30, 60, 20, 30, 24, 5, 10, 8])
    whole = by_id(Sampler(model).generate(requests, SAMPLED))
    assert by_id(Sampler(model, max_batch=8).generate(requests[::-1], SAMPLED)) == whole
    for request in requests:
        assert by_id(Sampler(model).generate([request], SAMPLED)) == {request.id: whole[request.id]}


def test_a_sampler_that_has_been_used_gives_the_same(make_decoder) -> None:
    """Its cache is larger then, and holds the keys and values of others."""
    model = make_decoder()
    used = Sampler(model, row_block=8)
    used.generate(make_requests([200] * 20, [50] * 20, seed=9), SAMPLED)
    assert used.generate(MIXED, SAMPLED) == Sampler(model, row_block=8).generate(MIXED, SAMPLED)


def test_a_rollout_depends_on_seed_id_and_index_alone(make_decoder) -> None:
    model = make_decoder()
    sampler = Sampler(model)
    prompt = MIXED[1].prompt_ids
    three = sampler.generate([Request("a", prompt, 30)], SAMPLED)[0]
    five = sampler.generate([Request("a", prompt, 30)], SamplingParams(1.0, n=5, stop_token_ids=STOPS, seed=5))[0]
    assert five[:3] == three
    assert len({tuple(rollout.token_ids) for rollout in five}) == 5
    other_id = sampler.generate([Request("b", prompt, 30)], SAMPLED)[0]
    other_seed = sampler.generate([Request("a", prompt, 30)], SamplingParams(1.0, n=3, stop_token_ids=STOPS, seed=6))[0]
    texts = [tuple(tuple(rollout.token_ids) for rollout in group) for group in (three, other_id, other_seed)]
    assert len(set(texts)) == 3


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


def test_every_rollout_ends_as_it_says(make_decoder) -> None:
    model = make_decoder(seed=2)
    requests = make_requests([3] * 30, [1 + number % 15 for number in range(30)])
    groups = Sampler(model, row_block=8, max_batch=16).generate(requests, SamplingParams(1.0, n=4, stop_token_ids=STOPS))
    endings = set()
    for request, group in zip(requests, groups, strict=True):
        assert len(group) == 4
        for rollout in group:
            assert rollout.request_id == request.id
            assert len(rollout.logprobs) == len(rollout.token_ids) <= request.max_new_tokens
            assert not set(rollout.token_ids[:-1]) & set(STOPS)
            assert all(logprob <= 0 for logprob in rollout.logprobs)
            if rollout.token_ids[-1] in STOPS:
                assert rollout.finish == "stop"
            else:
                assert rollout.finish == "length"
                assert len(rollout.token_ids) == request.max_new_tokens
            endings.add((rollout.finish, rollout.token_ids[-1] if rollout.finish == "stop" else None))
    assert endings == {("length", None), *(("stop", token) for token in STOPS)}


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[Chunk]]]:
    """(rows, chunks) of every forward pass from now on."""
    steps: list[tuple[int, list[Chunk]]] = []

    def watched(model: Decoder, batch: Batch, chunks: list[Chunk], *rest: Any) -> torch.Tensor:
        steps.append((len(batch.drafts), chunks))
        return forward(model, batch, chunks, *rest)

    forward = runner.forward
    monkeypatch.setattr(runner, "forward", watched)
    return steps


@pytest.mark.parametrize("step_tokens", [9, 20, 1024])
def test_the_prompt_of_a_group_is_prefilled_once(step_tokens: int, make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its rollouts do not sit down together, and in whatever chunks."""
    steps = watch_steps(monkeypatch)
    params = SamplingParams(1.0, n=11, stop_token_ids=STOPS)
    Sampler(make_decoder(), row_block=8, max_batch=8, step_tokens=step_tokens).generate(MIXED, params)
    assert all(rows + sum(len(chunk.token_ids) for chunk in chunks) <= step_tokens for rows, chunks in steps)
    prefilled = Counter(tuple(chunk.token_ids) for _, chunks in steps for chunk in chunks)
    if step_tokens == 1024:
        assert prefilled == Counter(tuple(request.prompt_ids[:-1]) for request in MIXED if len(request.prompt_ids) > 1)
    assert sum(len(ids) * times for ids, times in prefilled.items()) == sum(len(request.prompt_ids) - 1 for request in MIXED)


def test_decoding_goes_on_while_a_long_prompt_is_prefilled(make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = watch_steps(monkeypatch)
    requests = make_requests([2, 200], [50, 50])
    Sampler(make_decoder(), row_block=8, max_batch=4, step_tokens=12).generate(requests, SamplingParams(stop_token_ids=(96,)))
    mixed = [rows for rows, chunks in steps if chunks]
    assert len(mixed) > 15
    assert all(mixed[1:])  # from the second step on there are decoding rows in every one


@pytest.mark.parametrize("max_batch", [1, 8, 13, 20, 64])
def test_max_batch_is_kept_and_used(max_batch: int, make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = watch_steps(monkeypatch)
    Sampler(make_decoder(), row_block=8, max_batch=max_batch).generate(MIXED, SAMPLED)
    assert max(rows for rows, _ in steps) == min(max_batch, 3 * len(MIXED))


def test_a_small_cache_runs_fewer_at_a_time_and_changes_nothing(make_decoder) -> None:
    model = make_decoder(num_hidden_layers=4, num_key_value_heads=4, head_dim=32)
    roomy, tight = Sampler(model, row_block=8), Sampler(model, row_block=8, cache_mb=4)
    assert tight.generate(MIXED, SAMPLED) == roomy.generate(MIXED, SAMPLED)
    assert tight._cache is not None
    assert roomy._cache is not None
    assert tight._cache.blocks < roomy._cache.blocks


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_preemption_and_lag_change_nothing(data: st.DataObject, make_decoder) -> None:
    """Small blocks and hardly room for the longest request: what is thrown out and computed anew comes out the same, bit for bit."""
    model, whole = make_decoder(), undisturbed(make_decoder)
    size = data.draw(st.sampled_from([1, 5, 8, 16, 40]))
    sampler = Sampler(
        model,
        max_batch=data.draw(st.integers(4, 60)),
        step_tokens=data.draw(st.integers(61, 200)),
        block_size=size,
        lag=data.draw(st.integers(0, 2)),
    )
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in MIXED)
    blocks = -(-longest // size) + 1 + data.draw(st.integers(0, 30))
    sampler._cache = KVCache(model.config, blocks, size, torch.float32, CPU)
    sampler._cache_for = lambda requests, n: sampler._cache  # type: ignore[method-assign,assignment,return-value]
    assert by_id(sampler.generate(data.draw(st.permutations(MIXED)), SAMPLED)) == whole


@functools.cache
def undisturbed(make_decoder: Callable[..., Decoder]) -> dict[str, list[Rollout]]:
    return by_id(Sampler(make_decoder()).generate(MIXED, SAMPLED))


def test_progress_counts_every_rollout_once(make_decoder) -> None:
    calls: list[tuple[int, int]] = []
    Sampler(make_decoder(), row_block=8, max_batch=8).generate(MIXED, SAMPLED, lambda *call: calls.append(call))
    finished = [done for done, _ in calls]
    assert {total for _, total in calls} == {3 * len(MIXED)}
    assert finished == sorted(set(finished))
    assert finished[-1] == 3 * len(MIXED)
    assert len(finished) > 5


def test_an_interrupted_sampler_starts_afresh(make_decoder) -> None:
    model = make_decoder()
    sampler = Sampler(model, row_block=8, max_batch=16)
    expected = sampler.generate(MIXED, SAMPLED)
    for patience in (1, 9, 38):

        def interrupt(done: int, total: int, patience: int = patience) -> None:
            if done >= patience:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sampler.generate(MIXED, SAMPLED, interrupt)
        assert sampler.generate(MIXED, SAMPLED) == expected


def test_weights_changed_in_place_are_seen(make_decoder) -> None:
    model, other = make_decoder(seed=0), make_decoder(seed=1)
    sampler = Sampler(model)
    before = sampler.generate(MIXED, SAMPLED)
    with torch.no_grad():
        for weight, new in zip(model.parameters(), other.parameters(), strict=True):
            weight.copy_(new)
    sampler.on_weights_changed()
    after = sampler.generate(MIXED, SAMPLED)
    fresh = Sampler(other).generate(MIXED, SAMPLED)
    assert [rollout.token_ids for group in after for rollout in group] == [rollout.token_ids for group in fresh for rollout in group]
    assert [rollout.logprobs for group in after for rollout in group] == [rollout.logprobs for group in fresh for rollout in group]
    assert after != before
    assert {rollout.policy_version for group in before for rollout in group} == {0}
    assert {rollout.policy_version for group in after for rollout in group} == {1}


def test_the_model_can_be_trained_after_sampling(make_decoder) -> None:
    model = make_decoder()
    Sampler(model).generate(MIXED[:2], SAMPLED)
    model(torch.arange(9), torch.arange(9), PackedAttention([9], CPU)).square().sum().backward()
    assert all(
        parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.dim() == 1
    )


def test_nothing_asked_nothing_given(make_decoder) -> None:
    assert Sampler(make_decoder()).generate([], SAMPLED) == []


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(make_decoder) -> None:
    """Tokens spell "<number>"; a string may span tokens, and text before it is as without it."""
    model, spell = make_decoder(), lambda ids: "".join(f"<{token}>" for token in ids)
    free = Sampler(model).generate(MIXED, SAMPLED)
    for strings in (("><5",), ("7>", "<60")):
        params = dataclasses.replace(SAMPLED, stop_strings=strings)
        for lag in (0, 1):
            stopped = 0
            for group, whole in zip(Sampler(model, lag=lag).generate(MIXED, params, decode=spell), free, strict=True):
                for rollout, unstopped in zip(group, whole, strict=True):
                    texts = [spell(unstopped.token_ids[: count + 1]) for count in range(len(unstopped.token_ids))]
                    first = next((count for count, text in enumerate(texts) if any(string in text for string in strings)), None)
                    kept = len(unstopped.token_ids) if first is None else first + 1
                    assert rollout.token_ids == unstopped.token_ids[:kept]
                    assert rollout.logprobs == unstopped.logprobs[:kept]
                    assert rollout.finish == (unstopped.finish if first is None else "stop")
                    stopped += first is not None
            assert stopped > 5
    with pytest.raises(ValueError, match="stop_strings need decode="):
        Sampler(model).generate(MIXED, params)


def test_a_machine_that_breaks_the_rules_is_told(make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for such a machine: attention summed in longer stretches when there are more queries."""
    model = make_decoder()
    assert invariance.check_invariance(model, 16) is None
    whole = invariance.attend_chunk
    monkeypatch.setattr(invariance, "attend_chunk", lambda q, k, v, first: whole(q, k, v, first) * (1 + 1e-6 * (len(q) > 1)))
    with pytest.raises(ValueError, match=r"sampling.invariant is true, but with .* attention cut in different ways"):
        Sampler(model, invariant=True).generate(MIXED[:1], SAMPLED)
    with pytest.warns(UserWarning, match="rollouts depend on their company"):
        Sampler(model).generate(MIXED[:1], SAMPLED)
    Sampler(model, invariant=False).generate(MIXED[:1], SAMPLED)


GOOD = Request("good", [1, 2], 3)


@pytest.mark.parametrize(
    ("requests", "sentence"),
    [
        ([GOOD, Request("bad", [], 3)], "'bad' has an empty prompt"),
        ([GOOD, Request("bad", [1], 0)], "'bad' has max_new_tokens = 0"),
        ([GOOD, Request("bad", [1, 97], 3)], "'bad' has a token outside the vocabulary of 97"),
        ([GOOD, Request("bad", [-1, 1], 3)], "'bad' has a token outside the vocabulary of 97"),
        ([GOOD, Request("bad", [1] * 200, 57)], r"'bad' needs 257 positions \(200 for its prompt, 57 new\).* 256"),
        ([GOOD, Request("other", [1], 3), Request("good", [3], 3)], "'good' appears twice"),
    ],
)
def test_an_impossible_request_is_named(requests: list[Request], sentence: str, make_decoder) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampler(make_decoder()).generate(requests, SAMPLED)


def test_a_request_that_fills_the_context_is_served(make_decoder) -> None:
    ((rollout,),) = Sampler(make_decoder()).generate([Request("full", [5] * 200, 56)], SamplingParams(0.0, stop_token_ids=(96,)))
    assert len(rollout.token_ids) == 56 or rollout.finish == "stop"


def test_a_cache_too_small_for_one_request_is_named(make_decoder) -> None:
    model = make_decoder(num_hidden_layers=4, num_key_value_heads=4, head_dim=32)
    with pytest.raises(ValueError, match="request 'long' needs 230 cached tokens; cache_mb = 1 holds 240, and 480 are needed"):
        Sampler(model, cache_mb=1).generate([GOOD, Request("long", [1] * 200, 30)], SAMPLED)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"row_block": 7}, "row_block is 7"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"step_tokens": 256}, "step_tokens is 256; it must exceed max_batch = 256"),
    ],
)
def test_impossible_samplers_are_named(wrong: dict[str, int], sentence: str, make_decoder) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampler(make_decoder(), **wrong)
