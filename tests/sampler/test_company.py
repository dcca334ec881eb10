"""A rollout is the same whatever its company, the room there was, preemption and lag; a machine that breaks the rules is told."""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.model import Decoder
from bcr.sampler import Request, Rollout, Sampler, SamplingParams, attention, invariance, scheduler
from bcr.sampler.kv_cache import KVCache
from tests.sampler.cases import CPU, MIXED, SAMPLED, STOPS, by_id, make_requests


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


def test_a_small_cache_runs_fewer_at_a_time_and_changes_nothing(make_decoder) -> None:
    model = make_decoder(num_hidden_layers=4, num_key_value_heads=4, head_dim=32)
    roomy, tight = Sampler(model, row_block=8), Sampler(model, row_block=8, cache_mb=4)
    assert tight.generate(MIXED, SAMPLED) == roomy.generate(MIXED, SAMPLED)
    assert tight._cache is not None
    assert roomy._cache is not None
    assert tight._cache.blocks < roomy._cache.blocks


def test_rows_read_in_many_pieces_are_the_same(make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut wherever a place is spared, and kept in the order of their lengths to within 4 places."""
    whole, pieces = undisturbed(make_decoder), 0
    monkeypatch.setattr(attention, "CUT_BYTES", 1)
    monkeypatch.setattr(scheduler, "LIKE", 4)

    def counted(*given: Any) -> list[slice]:
        nonlocal pieces
        found = stretches(*given)
        pieces = max(pieces, len(found))
        return found

    stretches = attention.stretches
    monkeypatch.setattr(attention, "stretches", counted)
    assert by_id(Sampler(make_decoder()).generate(MIXED, SAMPLED)) == whole
    assert pieces > 5


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
