"""What a call of `generate` does and leaves behind: its steps, its calls of `progress`, after an interrupt, after an update."""

from collections import Counter
from typing import Any

import pytest
import torch

from bcr.model import Decoder
from bcr.model.attention import PackedAttention
from bcr.sampler import Sampler, SamplingParams, runner
from bcr.sampler.batch import Batch
from bcr.sampler.scheduler import Chunk
from tests.sampler.cases import CPU, MIXED, SAMPLED, STOPS, make_requests


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
