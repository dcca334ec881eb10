"""What cannot be sampled is refused with one sentence that names it; what just fits is served."""

import pytest

from bcr.sampler import Request, Sampler, SamplingParams
from tests.sampler.cases import SAMPLED

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
