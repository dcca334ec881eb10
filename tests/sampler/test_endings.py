"""How a completion ends: a stop token, a stop string, its budget."""

import dataclasses

import pytest

from bcr.sampler import Sampler, SamplingParams
from tests.sampler.cases import MIXED, SAMPLED, STOPS, make_requests


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
