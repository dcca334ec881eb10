"""The paged path, on a CPU with the kernels' reference backend: the same rollouts as the path that reads the cache in place, one step
behind as in step, padded as unpadded, through forks, chunks and preemption."""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.model import Decoder
from bcr.model.attention import PackedAttention
from bcr.sampler import Request, Rollout, Sampler, SamplingParams, paged_runner
from bcr.sampler.graphs import Work, padded_rows
from bcr.sampler.kv_cache import KVCache
from bcr.sampler.paged_runner import PagedRunner
from bcr.sampler.sampling import keyed_bits, row_key
from bcr.sampler.scheduler import Draft, Scheduler
from bcr_kernels import linear_sample

CPU = torch.device("cpu")
VOCABULARY = 97
STOPS = (1, 2, 3)
SAMPLED = SamplingParams(1.0, n=3, stop_token_ids=STOPS, seed=5)
BY_LOGITS = {"fused": False}


def make_requests(lengths: Sequence[int], budgets: Sequence[int], seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
    return [Request(f"r{k}", prompt, budget) for k, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True))]


MIXED = make_requests([1, 9, 2, 30, 16, 17, 5, 64, 3, 12], [40, 12, 1, 25, 33, 8, 60, 20, 5, 17])
LONGEST = max(len(request.prompt_ids) + request.max_new_tokens for request in MIXED)

Rollouts = dict[str, list[Rollout]]


def by_id(groups: Sequence[Sequence[Rollout]]) -> Rollouts:
    return {group[0].request_id: list(group) for group in groups}


def paged(model: Decoder, options: Mapping[str, Any] | None = None, **settings: Any) -> Sampler:
    return Sampler(model, paged=True, paged_options=options, **{"cache_mb": 4, **settings})


def same(found: Rollouts, wanted: Rollouts, tolerance: float) -> None:
    """Tokens and endings exactly, log-probs within the tolerance."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        for ours, theirs in zip(found[name], wanted[name], strict=True):
            assert (ours.token_ids, ours.finish) == (theirs.token_ids, theirs.finish)
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=tolerance)


@functools.cache
def in_place(make_decoder: Callable[..., Decoder]) -> Rollouts:
    return by_id(Sampler(make_decoder()).generate(MIXED, SAMPLED))


@functools.cache
def fused(make_decoder: Callable[..., Decoder]) -> Rollouts:
    return by_id(paged(make_decoder(), lag=0).generate(MIXED, SAMPLED))


def tight(sampler: Sampler, blocks: int) -> Sampler:
    """The sampler with so many blocks of cache."""
    assert sampler.block_size is not None
    cache = KVCache(sampler.model.config, blocks, sampler.block_size, torch.float32, CPU, token_major=True)
    sampler._cache_for = lambda requests, n: cache  # type: ignore[method-assign]
    return sampler


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_same_rollouts_as_in_place(data: st.DataObject, make_decoder) -> None:
    """Whatever the blocks, chunks, rows, lag and padding, and hardly room for the longest request; by either way of sampling."""
    options = {"fused": data.draw(st.booleans()), "padded": data.draw(st.booleans())}
    size = data.draw(st.sampled_from([1, 3, 16, 17, 64]))
    sampler = paged(
        make_decoder(),
        options,
        max_batch=data.draw(st.integers(1, 40)),
        step_tokens=data.draw(st.integers(41, 200)),
        block_size=size,
        lag=data.draw(st.integers(0, 3)),
    )
    tight(sampler, -(-LONGEST // size) + 1 + data.draw(st.integers(0, 30)))
    wanted = fused(make_decoder) if options["fused"] else in_place(make_decoder)
    same(by_id(sampler.generate(data.draw(st.permutations(MIXED)), SAMPLED)), wanted, 2e-4)


def test_the_test_above_preempts(make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    thrown: list[int] = []
    preempt = Scheduler._preempt

    def counted(scheduler: Scheduler, draft: Draft) -> None:
        thrown.append(len(draft.token_ids))
        preempt(scheduler, draft)

    monkeypatch.setattr(Scheduler, "_preempt", counted)
    sampler = tight(paged(make_decoder(), BY_LOGITS, block_size=16, lag=1), -(-LONGEST // 16) + 2)
    same(by_id(sampler.generate(MIXED, SAMPLED)), in_place(make_decoder), 2e-4)
    assert len(thrown) >= 3
    assert max(thrown) > 10


@torch.no_grad()
def test_tokens_and_logprobs_are_those_of_the_forward_pass(make_decoder) -> None:
    """`linear_sample` on the hidden states of one forward pass over prompt and completion draws the very tokens, but for ties."""
    model, params = make_decoder(), SamplingParams(0.8, n=2, stop_token_ids=STOPS, seed=3)
    compared = 0
    for request, group in zip(MIXED, paged(model).generate(MIXED, params), strict=True):
        for index, rollout in enumerate(group):
            tokens = torch.tensor([*request.prompt_ids, *rollout.token_ids[:-1]])
            hidden = model(tokens, torch.arange(len(tokens)), PackedAttention([len(tokens)], CPU))[len(request.prompt_ids) - 1 :]
            keys = torch.full((len(hidden),), row_key(3, request.id, index))
            drawn = linear_sample(hidden, model.head_weight, keyed_bits(keys, torch.arange(len(hidden))), temperature=0.8)
            assert drawn.logprob is not None
            assert rollout.token_ids == drawn.token.tolist()
            assert rollout.logprobs == pytest.approx(drawn.logprob.tolist(), abs=1e-4)
            compared += len(hidden)
    assert compared > 200


def test_greedy_and_cut_distributions(make_decoder) -> None:
    """Through the fused head where nothing is cut, through logits where something is, by one sampler after the other."""
    model = make_decoder()
    sampler = paged(model)
    for params in (
        SamplingParams(0.0, stop_token_ids=STOPS),
        SamplingParams(1.0, n=2, stop_token_ids=STOPS, top_k=5, top_p=0.9, min_p=0.01),
        SamplingParams(0.7, stop_token_ids=tuple(range(1, 40)), top_k=20),
    ):
        same(by_id(sampler.generate(MIXED, params)), by_id(Sampler(model).generate(MIXED, params)), 2e-4)


class LateCopy(paged_runner.HostCopy):
    """As on CUDA: before `wait()` the values are not there yet."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        self.real = self.values.clone()
        self.values.fill_(float("nan"))

    def wait(self) -> None:
        self.values.copy_(self.real)


def test_one_step_behind_draws_the_same_tokens(make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop tokens, budgets, stop strings and forks; what comes after the end of a rollout is dropped.

    Log-probs are equal but for rounding, for a row that has ended stays in the passes until the host has read of it, and other passes have
    products of other shapes. With one row at a time every pass has the same shape, and they are equal to the last bit.
    """
    model = make_decoder()
    spell = lambda ids: "".join(f"<{token}>" for token in ids)  # noqa: E731
    monkeypatch.setattr(paged_runner, "HostCopy", LateCopy)
    for params in (SAMPLED, SamplingParams(1.0, n=3, stop_token_ids=STOPS, stop_strings=("7>", "><5"))):
        synchronous = paged(model, {"padded": False}, lag=0).generate(MIXED, params, decode=spell)
        for lag in (1, 2):
            behind = paged(model, {"padded": False}, lag=lag).generate(MIXED, params, decode=spell)
            same(by_id(behind), by_id(synchronous), 1e-5)
        one_row = [paged(model, max_batch=1, lag=lag).generate(MIXED[:4], params, decode=spell) for lag in (0, 1)]
        assert one_row[0] == one_row[1]


class Captured:
    """A stand-in for a graph: it replays on the buffers that it was captured with, and notices where they are others by then."""

    def __init__(self) -> None:
        self.runner: PagedRunner | None = None
        self.captured = self.replayed = 0

    def __call__(self, work: Work) -> Work:
        self.captured += 1
        places = self.places()

        def replay() -> None:
            assert self.places() == places
            self.replayed += 1
            work()

        return replay

    def places(self) -> list[int]:
        assert self.runner is not None
        runner = self.runner
        buffers = [runner.rows.state, runner.rows.table, runner.ends, runner.temperature, runner.stops, runner.out, runner.cache.memory]
        return [buffer.data_ptr() for buffer in [*buffers, *runner.model.parameters()]]


def test_captured_steps_are_replayed(make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size is captured once, whatever the call, the temperature, the stop tokens and the weights; the outcome is the eager one's."""
    model, capture = make_decoder(), Captured()
    begin = PagedRunner.begin

    def began(runner: PagedRunner, params: SamplingParams) -> None:
        capture.runner = runner
        begin(runner, params)

    monkeypatch.setattr(PagedRunner, "begin", began)
    sampler = paged(model, {"capture": capture}, lag=1)
    first = sampler.generate(MIXED, SAMPLED)
    same(by_id(first), fused(make_decoder), 1e-4)
    captured = capture.captured
    assert captured <= len({padded_rows(rows) for rows in range(1, 3 * len(MIXED) + 1)})
    assert capture.replayed > 3 * captured
    assert sampler.generate(MIXED, SAMPLED) == first
    other = SamplingParams(0.5, n=3, stop_token_ids=(7, 8), seed=1)
    same(by_id(sampler.generate(MIXED, other)), by_id(paged(model, {"padded": False}).generate(MIXED, other)), 1e-4)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    sampler.on_weights_changed()
    same(by_id(sampler.generate(MIXED, SAMPLED)), by_id(paged(model).generate(MIXED, SAMPLED)), 1e-4)
    assert capture.captured <= captured + 2
    captured, moved = capture.captured, model.layers[1].mlp.down_proj.weight
    moved.data = moved.data.clone()  # not in place
    same(by_id(sampler.generate(MIXED, SAMPLED)), by_id(paged(model).generate(MIXED, SAMPLED)), 1e-4)
    assert capture.captured > captured + 3


def test_a_group_shares_its_prompt(make_decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefilled once; a fork copies its last block and no more."""
    copied: list[int] = []
    prefilled: list[int] = []
    copy, prefill = KVCache.copy, PagedRunner._prefill
    monkeypatch.setattr(KVCache, "copy", lambda cache, copies: (copied.extend(count for *_, count in copies), copy(cache, copies))[1])
    monkeypatch.setattr(
        PagedRunner, "_prefill", lambda runner, chunks: (prefilled.extend(len(c.token_ids) for c in chunks), prefill(runner, chunks))[1]
    )
    request = make_requests([52], [10])
    paged(make_decoder(), block_size=16).generate(request, SamplingParams(1.0, n=7, stop_token_ids=(96,)))
    assert prefilled == [51]
    assert copied == [51 % 16] * 6


def test_sharing_a_prompt_changes_nothing(make_decoder) -> None:
    """To the last bit, on the path where bits do not depend on the company."""
    alone = Sampler(make_decoder(), share_prompts=False).generate(MIXED[:6], SAMPLED)
    assert by_id(alone) == {request.id: in_place(make_decoder)[request.id] for request in MIXED[:6]}


def test_an_interrupted_sampler_starts_afresh(make_decoder) -> None:
    sampler = paged(make_decoder(), lag=1)
    expected = sampler.generate(MIXED, SAMPLED)

    def interrupt(done: int, total: int) -> None:
        if done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(MIXED, SAMPLED, interrupt)
    assert sampler.generate(MIXED, SAMPLED) == expected
