"""The sampler on CUDA: it never waits, its graphs do what the eager steps do, and its log-probs are the learner's."""

import gc

import pytest
import torch
from paged_cases import paged as paged_case

from bcr.model import Decoder
from bcr.model.attention import PackedAttention
from bcr.model.ops import available_here
from bcr.records import Request
from bcr.sampler import Sampler, SamplingParams
from bcr.sampler.graphs import eager
from bcr.sampler.paged import Way
from bcr_kernels import linear_logprob, paged_attention

PARAMS = SamplingParams(0.9, n=8, stop_token_ids=(1, 2), seed=4)
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2}  # of the mean |delta log-prob|
CUDA = torch.device("cuda")


def requests_of(count: int, longest: int = 200, new: int = 120) -> list[Request]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [Request(f"r{k}", torch.randint(3, 97, (length,), generator=generator).tolist(), new) for k, length in enumerate(lengths)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, make_decoder) -> Decoder:
    sizes = {"hidden_size": 256, "head_dim": 64, "vocab_size": 5003, "max_position_embeddings": 2048}
    return make_decoder(**sizes).to("cuda", request.param)


def test_the_kernels_serve(model: Decoder) -> None:
    assert Way.of(CUDA, model.head_weight.dtype, 64).attention == "bcr_kernels"


def test_the_steady_state_never_waits(model: Decoder) -> None:
    """Whole calls: forks, chunks, rows that come and go. What was captured in the first call is replayed in the second."""
    sampler = Sampler(model, cache_mb=512, max_batch=48)
    first = sampler.generate(requests_of(12), PARAMS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = sampler.generate(requests_of(12), PARAMS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert second == first


def test_graphs_are_the_eager_steps(model: Decoder) -> None:
    captured = Sampler(model, cache_mb=512, max_batch=48)
    plain = Sampler(model, cache_mb=512, max_batch=48, paged_options={"capture": eager})
    expected = plain.generate(requests_of(12), PARAMS)
    for _ in range(2):  # the first call captures, the second replays
        assert captured.generate(requests_of(12), PARAMS) == expected
    other = SamplingParams(0.5, n=3, stop_token_ids=(7,), seed=9)
    assert captured.generate(requests_of(9), other) == plain.generate(requests_of(9), other)


def test_one_step_behind_changes_nothing(model: Decoder) -> None:
    """Which rows are there when differs, so only passes of one size can be compared to the last bit: `invariant`."""
    sizes = {"cache_mb": 512, "max_batch": 16, "invariant": True}
    whole = [Sampler(model, lag=lag, **sizes).generate(requests_of(6), PARAMS) for lag in (0, 1, 2)]
    assert whole[0] == whole[1] == whole[2]


def test_weights_that_change_in_place_need_no_new_graph(make_decoder) -> None:
    model, other = (make_decoder(seed=seed).to("cuda", torch.bfloat16) for seed in (0, 1))
    sampler = Sampler(model, cache_mb=64)
    sampler.generate(requests_of(4, 60, 20), PARAMS)
    assert sampler._paged_runner is not None
    graphs = dict(sampler._paged_runner.graphs.held)
    with torch.no_grad():
        for weight, new in zip(model.parameters(), other.parameters(), strict=True):
            weight.copy_(new)
    sampler.on_weights_changed()
    found = sampler.generate(requests_of(4, 60, 20), PARAMS)
    assert all(sampler._paged_runner.graphs.held[key] is graph for key, graph in graphs.items())
    fresh = Sampler(other, cache_mb=64).generate(requests_of(4, 60, 20), PARAMS)
    for ours, theirs in zip(found, fresh, strict=True):
        assert [(r.token_ids, r.logprobs) for r in ours] == [(r.token_ids, r.logprobs) for r in theirs]


def test_graphs_are_captured_anew_where_the_old_ones_are_gone(make_decoder) -> None:
    """With the cache, and for a longer list of stop tokens; another sampler's graphs stay valid beside it."""
    model = make_decoder().to("cuda", torch.bfloat16)
    sampler, other = Sampler(model, cache_mb=64), Sampler(model, cache_mb=64)
    many = SamplingParams(0.9, n=8, stop_token_ids=tuple(range(1, 20)), seed=4)
    first, beside = sampler.generate(requests_of(4, 60, 20), PARAMS), other.generate(requests_of(4, 60, 20), many)
    sampler.release_cache()
    assert sampler.generate(requests_of(4, 60, 20), PARAMS) == first
    assert sampler.generate(requests_of(4, 60, 20), many) == beside
    del sampler
    assert other.generate(requests_of(4, 60, 20), many) == beside


@torch.no_grad()
def test_logprobs_are_the_learners(model: Decoder) -> None:
    requests = requests_of(8)
    differences = []
    for request, group in zip(requests, Sampler(model, cache_mb=512).generate(requests, PARAMS), strict=True):
        for rollout in group:
            tokens = torch.tensor([*request.prompt_ids, *rollout.token_ids], device="cuda")
            hidden = model(tokens[:-1], torch.arange(len(tokens) - 1, device="cuda"), PackedAttention([len(tokens) - 1], CUDA))
            start = len(request.prompt_ids) - 1
            learner = linear_logprob(hidden[start:], model.head_weight, tokens[start + 1 :], temperature=0.9).logprob
            differences.append((learner.cpu() - torch.tensor(rollout.logprobs)).abs())
    assert float(torch.cat(differences).mean()) < TOLERANCE[model.head_weight.dtype]
    assert sum(map(len, differences)) > 1000


def test_a_shared_prompt_is_the_prompt(model: Decoder) -> None:
    """With the same passes in both cases, so that their numbers may be compared: `invariant`."""
    options = {"cache_mb": 1024, "max_batch": 64, "invariant": True}
    assert Sampler(model, **options).generate(requests_of(4), PARAMS) == Sampler(model, share_prompts=False, **options).generate(
        requests_of(4), PARAMS
    )


def test_invariant_rollouts_do_not_depend_on_their_company(model: Decoder) -> None:
    """Nor on how their prompt was cut: 300 tokens a step are fewer than the prompts have together."""
    sampler = Sampler(model, cache_mb=1024, max_batch=64, step_tokens=300, invariant=True)
    requests = requests_of(10)
    whole = sampler.generate(requests, PARAMS)
    assert sampler.generate(requests[::-1], PARAMS)[::-1] == whole
    for request, group in zip(requests[:3], whole, strict=False):
        assert sampler.generate([request], PARAMS) == [group]


@pytest.mark.parametrize("name", ["flash-attn", "torch varlen"])
@pytest.mark.parametrize("queries", [1, 33])
def test_the_other_attention_agrees(name: str, queries: int) -> None:
    needed = {"flash-attn": "flash-attn", "torch varlen": "block tables"}[name]
    if needed not in available_here():
        pytest.skip(f"{name} with block tables is not installed")
    from bcr.sampler.kv_cache import KVCache
    from bcr.sampler.paged import PagedAttention

    case = paged_case([700, 90, 257], [queries] * 3, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, block_size=256)
    q, k_cache, v_cache, tables, lengths, ends = case.arguments("cuda")
    k_cache.nan_to_num_(), v_cache.nan_to_num_(), tables.clamp_(max=len(k_cache) - 1)
    cache = object.__new__(KVCache)
    cache.keys, cache.values = [k_cache], [v_cache]
    nowhere = torch.full((len(q),), -1, device="cuda")
    attention = PagedAttention(cache, nowhere, tables, lengths, ends, queries, Way(name, "triton"))
    nothing = q.new_zeros(len(q), 2, 128)
    wanted = paged_attention(q, k_cache, v_cache, tables, lengths, ends)
    assert float((attention(0, q, nothing, nothing).float() - wanted.float()).abs().max()) < 3e-2


def test_the_cache_takes_its_share_of_what_is_free(make_decoder) -> None:
    model = make_decoder(num_hidden_layers=8, num_key_value_heads=8, num_attention_heads=8, head_dim=128, max_position_embeddings=16_384)
    sampler = Sampler(model.to("cuda", torch.bfloat16), max_batch=256)
    gc.collect()
    torch.cuda.empty_cache()  # what earlier tests have left counts as free to the sampler
    free, _ = torch.cuda.mem_get_info()
    sampler.generate(requests_of(4, 60, 20), PARAMS)
    assert sampler._cache is not None
    assert 0 < sampler._cache.memory.nbytes <= 0.9 * free
    sampler.release_cache()


def test_the_learner_gets_the_cache_between_calls(make_decoder) -> None:
    pytest.importorskip("torch_memory_saver")
    sampler = Sampler(make_decoder().to("cuda", torch.bfloat16), cache_mb=1024, learner_bytes=1)
    first = sampler.generate(requests_of(4, 60, 20), PARAMS)
    lent, _ = torch.cuda.mem_get_info()
    assert sampler.generate(requests_of(4, 60, 20), PARAMS) == first
    assert torch.cuda.mem_get_info()[0] == pytest.approx(lent, abs=2**28)
    sampler.learner_bytes = 0  # from now on it keeps the cache
    assert sampler.generate(requests_of(4, 60, 20), PARAMS) == first
    assert torch.cuda.mem_get_info()[0] < lent - 2**29
