"""The cache's size, its loan to the learner, and `invariant` on the paged path; on a CPU, with stand-ins for the device."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bcr.sampler import Request, Sampler, SamplingParams, memory, paged
from bcr.sampler.kv_cache import KVCache
from bcr.sampler.memory import ALONE, KEPT, LENT, Loan, block_count, cache_bytes, cache_share
from bcr.sampler.paged_runner import PagedRunner

REQUESTS = [Request(f"r{k}", [k + 1] * (1 + 7 * k), 20) for k in range(9)]
PARAMS = SamplingParams(1.0, n=3, stop_token_ids=(1, 2, 3), seed=2)

GIB = 2**30
sizes = st.integers(0, 200 * GIB)


@given(sizes, sizes, sizes, st.sampled_from([ALONE, LENT, KEPT]), st.integers(1, 10**7), st.integers(1, 1024), st.integers(1, 700))
def test_what_the_cache_takes_leaves_room_for_steps_and_learner(
    free: int, step: int, learner: int, share: float, block: int, rows: int, per_row: int
) -> None:
    room = cache_bytes(free, step, learner, share)
    blocks = block_count(room, block, rows, per_row)
    assert 0 <= blocks <= (rows + 1) * per_row
    assert blocks == 0 or blocks * block + step + learner <= free
    if room // block <= rows * per_row:
        assert blocks == room // block  # what may be used is used
    assert cache_bytes(free + GIB, step, learner, share) >= room


def test_the_share_depends_on_who_else_is_there() -> None:
    assert cache_share(0, saver=False) == cache_share(0, saver=True) == ALONE
    assert cache_share(1, saver=False) == KEPT < cache_share(1, saver=True) == LENT < ALONE


class FakeSaver:
    """Keeps addresses and forgets contents, as `torch_memory_saver` does."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.sampler: Sampler | None = None

    @contextmanager
    def region(self, tag: str) -> Iterator[None]:
        self.log.append("region")
        yield

    def cache(self) -> torch.Tensor:
        assert self.sampler is not None
        assert self.sampler._cache is not None
        return self.sampler._cache.memory

    def pause(self, tag: str) -> None:
        self.log.append("pause")
        self.cache().fill_(float("nan"))

    def resume(self, tag: str) -> None:
        self.log.append("resume")


@torch.inference_mode()
def test_the_cache_is_lent_and_taken_back(make_decoder) -> None:
    """With the same addresses, so that graphs stay valid, and without the old contents."""
    saver = FakeSaver()
    sampler = Sampler(make_decoder(), paged=True, cache_mb=2, learner_bytes=1)
    sampler.loan, saver.sampler = Loan(saver), sampler
    before = sampler.generate(REQUESTS, PARAMS)
    runner, place = sampler._paged_runner, saver.cache().data_ptr()
    assert saver.log == ["region", "pause"]
    assert sampler.generate(REQUESTS, PARAMS) == before
    assert saver.log[2:] == ["resume", "pause"]
    assert sampler._paged_runner is runner
    assert saver.cache().data_ptr() == place
    sampler.release_cache()
    assert saver.log[4:] == ["resume"]
    assert sampler.generate(REQUESTS, PARAMS) == before


@torch.inference_mode()
def test_without_a_learner_or_a_saver_the_cache_is_kept(make_decoder) -> None:
    for learner_bytes, saver in ((0, FakeSaver()), (1, None)):
        sampler = Sampler(make_decoder(), paged=True, cache_mb=2, learner_bytes=learner_bytes)
        sampler.loan = Loan(saver)
        sampler.generate(REQUESTS[:2], PARAMS)
        assert not sampler.loan.lent
        assert saver is None or saver.log == ["region"]


def test_a_warm_up_leaves_nothing_behind(make_decoder) -> None:
    model = make_decoder()
    sampler = Sampler(model, paged=True, cache_mb=2)
    expected = sampler.generate(REQUESTS, PARAMS)
    runner = sampler._paged_runner
    assert runner is not None
    held = runner.cache.memory.clone()
    with torch.inference_mode():
        runner.warm_up(70)
    assert torch.equal(runner.cache.memory, held)
    assert sampler.generate(REQUESTS, PARAMS) == expected


def test_null_is_two_gibibytes_on_a_cpu(make_decoder) -> None:
    model = make_decoder()
    assert Sampler(model)._affordable_blocks(64) == Sampler(model, cache_mb=2048)._affordable_blocks(64)


def test_a_cache_that_the_device_cannot_hold_is_named(make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cache_mb: null` on a device that is nearly full."""
    sampler = Sampler(make_decoder(), paged=True)
    sampler.on_cpu = False
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda device: (40_000, 10**9))
    monkeypatch.setattr("bcr.sampler.engine.peak_of", lambda work, device: (work(), 1000)[1])
    with pytest.raises(ValueError, match=r"'r8' needs 77 cached tokens; what is free on the device .* holds 64, and 192 are needed"):
        sampler.generate(REQUESTS, PARAMS)


def test_invariant_mode_keeps_every_pass_at_one_size(make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that matrix products have one shape each, whatever the company; and the tokens are those of the other mode."""
    model = make_decoder()
    passes = set()
    forward = type(model).forward

    def watched(self: object, ids: torch.Tensor, *rest: object) -> torch.Tensor:
        passes.add(len(ids))
        return forward(self, ids, *rest)  # type: ignore[arg-type]

    plain = Sampler(model, paged=True, cache_mb=2, max_batch=10, step_tokens=24).generate(REQUESTS, PARAMS)
    sampler = Sampler(model, paged=True, cache_mb=2, max_batch=10, step_tokens=24, invariant=True)
    monkeypatch.setattr(type(model), "forward", watched)
    found = sampler.generate(REQUESTS, PARAMS)
    assert passes == {16, 32 + 16}
    alone = [sampler.generate([request], PARAMS)[0] for request in REQUESTS]
    assert passes == {16, 32 + 16}
    for others in (plain, alone):
        for ours, theirs in zip(found, others, strict=True):
            assert [rollout.token_ids for rollout in ours] == [rollout.token_ids for rollout in theirs]


def one_query_at_a_time(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, ends: torch.Tensor, **_: int
) -> torch.Tensor:
    """`paged_attention` in float64, in which no query knows of another."""
    out = torch.zeros_like(query)
    share = query.shape[1] // keys.shape[2]
    for row, length in enumerate(lengths.tolist()):
        held = [cache[table[row].long()].flatten(0, 1).repeat_interleave(share, 1).double() for cache in (keys, values)]
        for at in range(int(ends[row]), int(ends[row + 1]) if length else 0):
            key, value = (cached[: length - int(ends[row + 1]) + at + 1] for cached in held)
            scores = (key * query[at].double()).sum(-1) * query.shape[2] ** -0.5
            out[at] = (scores.softmax(0)[..., None] * value).sum(0)
    return out


def test_invariant_rollouts_do_not_depend_on_company_cuts_or_lag(make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, where attention gives a query its bits whatever stands beside it, as the kernels do on CUDA. The reference of a CPU
    does not: `scaled_dot_product_attention` depends on how many queries of a prompt come together, and log-probs then differ by some 1e-6.
    """
    monkeypatch.setattr(paged, "paged_attention", one_query_at_a_time)
    options = {"paged": True, "cache_mb": 2, "max_batch": 10, "step_tokens": 24, "invariant": True}
    model, requests = make_decoder(), REQUESTS[::4]
    together = Sampler(model, **options).generate(requests, PARAMS)
    assert Sampler(model, lag=2, **options).generate(requests[::-1], PARAMS)[::-1] == together
    assert Sampler(model, share_prompts=False, **options).generate(requests, PARAMS) == together
    for request, group in zip(requests, together, strict=True):
        assert Sampler(model, **options).generate([request], PARAMS) == [group]


def test_preemption_in_invariant_mode_is_said(make_decoder) -> None:
    sampler = Sampler(make_decoder(), paged=True, invariant=True, block_size=16)
    cache = KVCache(sampler.model.config, 8, 16, torch.float32, torch.device("cpu"), token_major=True)
    sampler._cache_for = lambda requests, n: cache  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="rollouts were preempted, which sampling.invariant does not cover"):
        sampler.generate(REQUESTS, PARAMS)
    sampler = Sampler(make_decoder(), paged=True, invariant=True, cache_mb=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.generate(REQUESTS, PARAMS)


def test_a_lone_token_of_a_prompt_goes_through_the_kernel_for_prompts(make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = []
    prefill = PagedRunner._prefill

    def watched(runner: PagedRunner, chunks: list) -> None:
        longest.append([len(chunk.token_ids) for chunk in chunks])
        prefill(runner, chunks)

    monkeypatch.setattr(PagedRunner, "_prefill", watched)
    request = [Request("r", list(range(1, 10)), 9)]
    whole = Sampler(make_decoder(), paged=True, cache_mb=2).generate(request, PARAMS)
    cut = Sampler(make_decoder(), paged=True, cache_mb=2, max_batch=3, step_tokens=7).generate(request, PARAMS)
    assert longest == [[8], [7], [1]]
    assert [r.token_ids for r in cut[0]] == [r.token_ids for r in whole[0]]
