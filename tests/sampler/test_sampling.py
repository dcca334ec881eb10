"""Keyed random numbers are splitmix64, sampling follows the distribution, and log-probs are those of the whole vocabulary."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from bcr.sampler import SamplingParams
from bcr.sampler import sampling as under_test
from bcr.sampler.sampling import keyed_uniform, row_key, sample

WORD = 2**64 - 1


def splitmix64(seed: int, index: int) -> int:
    """Output `index` (from 0) of the generator seeded with `seed`, in unbounded integers."""
    x = (seed + (index + 1) * 0x9E3779B97F4A7C15) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def uniform(key: int, position: int) -> float:
    return float(keyed_uniform(torch.tensor([key]), torch.tensor([position])))


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]),
    ],
)
def test_published_outputs_of_splitmix64(seed: int, outputs: list[int]) -> None:
    assert [splitmix64(seed, index) for index in range(len(outputs))] == outputs
    assert [uniform(seed, index) for index in range(len(outputs))] == [(output >> 11) / 2**53 for output in outputs]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_equals_splitmix64_in_unbounded_integers(key: int, position: int) -> None:
    found = uniform(key, position)
    assert found == (splitmix64(key, position) >> 11) / 2**53
    assert 0.0 <= found < 1.0


def test_equals_splitmix64_on_many_rows_at_once() -> None:
    rng = random.Random(0)
    keys = [rng.randrange(-(2**63), 2**63) for _ in range(5000)]
    positions = [rng.randrange(40_000) for _ in range(5000)]
    expected = [(splitmix64(key, position) >> 11) / 2**53 for key, position in zip(keys, positions, strict=True)]
    assert keyed_uniform(torch.tensor(keys), torch.tensor(positions)).tolist() == expected


def chi_square_is_usual(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the statistic lies within 4 standard deviations of its mean (fixed keys: the answer is always the same)."""
    freedom = counts.size - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def rollout_keys(count: int) -> torch.Tensor:
    return torch.tensor([row_key(0, f"request {number}", 0) for number in range(count)])


def test_uniform_over_positions_over_keys_and_in_neighbouring_pairs() -> None:
    along = keyed_uniform(torch.full((64_000,), row_key(3, "a", 0)), torch.arange(64_000))
    across = keyed_uniform(rollout_keys(64_000), torch.zeros(64_000, dtype=torch.int64))
    for numbers in (along, across):
        cells = (numbers * 64).long()
        assert chi_square_is_usual(torch.bincount(cells, minlength=64).numpy(), np.full(64, 1000.0))
        coarse = (numbers * 8).long()
        pairs = coarse[:-1] * 8 + coarse[1:]
        assert chi_square_is_usual(torch.bincount(pairs, minlength=64).numpy(), np.full(64, 63_999 / 64))


def test_row_keys_differ_in_every_name_and_do_not_change() -> None:
    names = [(seed, request, index) for seed in (0, 1, 11) for request in ("a", "b", "1", "1a", "") for index in (0, 1, 11)]
    keys = [row_key(*name) for name in names]
    assert len(set(keys)) == len(names)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert any(key < 0 for key in keys)
    assert row_key(7, "bundle/7/0", 3) == KEY_OF_7_BUNDLE_7_0_3


KEY_OF_7_BUNDLE_7_0_3 = 0x541E59C3F84E6F82  # printf "7\0bundle/7/0\0" "3" | b2sum -l 64, its bytes reversed


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.8])
def test_samples_follow_the_distribution(temperature: float) -> None:
    logits, rows = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.5, 0.31, float("-inf"), -2.0]), 60_000
    params = SamplingParams(temperature, stop_token_ids=(0,))
    tokens, _ = sample(logits.expand(rows, -1), params, rollout_keys(rows), torch.arange(rows) % 50)
    counts = torch.bincount(tokens, minlength=9).numpy()
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * rows
    assert counts[7] == 0
    assert chi_square_is_usual(counts[expected > 0], expected[expected > 0])
    # the test can tell: a neighbouring temperature does not pass
    other = torch.softmax(logits.double() / (temperature * 1.05), -1).numpy() * rows
    assert not chi_square_is_usual(counts[expected > 0], other[expected > 0])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.5])
def test_logprob_is_that_of_the_full_vocabulary_at_the_temperature(temperature: float) -> None:
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(1)) * 3
    tokens, logprobs = sample(logits, SamplingParams(temperature, stop_token_ids=(0,)), rollout_keys(200), torch.arange(200))
    exact = torch.log_softmax(logits.double() / (temperature or 1.0), dim=-1).gather(1, tokens[:, None]).squeeze(1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=5e-6)
    if temperature == 0:
        assert torch.equal(tokens, logits.argmax(dim=-1))
    else:
        assert len(set(tokens.tolist())) > 20


@pytest.mark.parametrize("number", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("vocabulary", [5, 50_000])
def test_a_token_of_probability_zero_is_never_drawn(number: float, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the random number is the smallest or the largest there is."""
    monkeypatch.setattr(under_test, "keyed_uniform", lambda keys, _: torch.full((len(keys),), number, dtype=torch.float64))
    logits = torch.randn(300, vocabulary, generator=torch.Generator().manual_seed(2)) * 4
    possible = torch.rand(300, vocabulary, generator=torch.Generator().manual_seed(3)) < 0.4
    possible[:, 0] = possible[:, -1] = False
    possible[:, 2] = True
    logits = logits.masked_fill(~possible, float("-inf"))
    rows = torch.arange(300)
    tokens, logprobs = sample(logits, SamplingParams(stop_token_ids=(0,)), rows, rows)
    assert bool(possible[rows, tokens].all())
    assert bool(logprobs.isfinite().all())


def test_the_inverse_of_the_cumulative_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities 1/4, 1/2, 1/4."""
    numbers = torch.tensor([0.0, 0.24999, 0.25001, 0.74999, 0.75001, 0.99999], dtype=torch.float64)
    monkeypatch.setattr(under_test, "keyed_uniform", lambda *_: numbers)
    logits = torch.tensor([1.0, 2.0, 1.0]).log().expand(6, 3)
    assert torch.softmax(logits, -1)[0].tolist() == [0.25, 0.5, 0.25]
    tokens, _ = sample(logits, SamplingParams(stop_token_ids=(0,)), torch.arange(6), torch.arange(6))
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]


def test_rare_tokens_of_a_large_vocabulary_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind one common token stand 2^18 of relative weight 2^-26 each: steps too small for a cumulative sum in float32."""
    rare, weight = 2**18, 2.0**-26
    wanted = torch.arange(1, rare, 9_999)
    targets = (1 + (wanted.double() - 0.5) * weight) / (1 + rare * weight)
    monkeypatch.setattr(under_test, "keyed_uniform", lambda *_: targets)
    logits = torch.cat([torch.zeros(1), torch.full((rare,), weight).log()]).expand(len(wanted), -1)
    tokens, _ = sample(logits, SamplingParams(stop_token_ids=(0,)), wanted, wanted)
    assert int((tokens - wanted).abs().max()) <= 1


def test_no_row_looks_at_another() -> None:
    logits = torch.randn(37, 301, generator=torch.Generator().manual_seed(4)) * 2
    keys, positions, params = rollout_keys(37), torch.arange(37) * 7, SamplingParams(0.9, stop_token_ids=(0,))
    tokens, logprobs = sample(logits, params, keys, positions)
    for row in range(37):
        one = slice(row, row + 1)
        alone = sample(logits[one], params, keys[one], positions[one])
        assert torch.equal(alone[0], tokens[one])
        assert torch.equal(alone[1], logprobs[one])


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "min_p": 0.02}, {"top_p": 1e-6}])
def test_what_is_cut_is_what_transformers_cuts(cut: dict[str, float]) -> None:
    """The same tokens stay possible, and log-probs are those of the whole distribution."""
    logits = torch.randn(40, 60, generator=torch.Generator().manual_seed(6)) * 2
    params = SamplingParams(0.8, stop_token_ids=(0,), **cut)  # type: ignore[arg-type]
    warpers = [
        TopKLogitsWarper(params.top_k) if params.top_k else None,
        TopPLogitsWarper(params.top_p) if params.top_p < 1 else None,
        MinPLogitsWarper(params.min_p) if params.min_p else None,
    ]
    scores = logits / 0.8
    for warper in warpers:
        scores = scores if warper is None else warper(None, scores)
    weights = under_test.truncate(torch.softmax(logits / 0.8, -1), params)
    assert torch.equal(weights > 0, scores > float("-inf"))
    rows = torch.arange(40)
    drawn = set()
    for position in range(200):
        tokens, logprobs = sample(logits, params, rollout_keys(40), torch.full((40,), position))
        assert bool((weights[rows, tokens] > 0).all())
        exact = torch.log_softmax(logits.double() / 0.8, -1)[rows, tokens]
        torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=5e-6)
        drawn.add(int(tokens[3]))
    assert len(drawn) >= min(3, int((weights[3] > 0).sum()))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": -0.1}, "sampling.temperature is -0.1"),
        ({"temperature": float("nan")}, "sampling.temperature is nan"),
        ({"temperature": float("inf")}, "sampling.temperature is inf"),
        ({"n": 0}, "sampling.n is 0"),
        ({"stop_token_ids": ()}, "sampling.stop_token_ids is empty"),
        ({"top_k": -1}, "sampling.top_k is -1"),
        ({"top_p": 0.0}, "sampling.top_p is 0.0"),
        ({"top_p": 1.1}, "sampling.top_p is 1.1"),
        ({"min_p": 1.5}, "sampling.min_p is 1.5"),
        ({"stop_strings": ("a", "")}, "sampling.stop_strings holds an empty string"),
    ],
)
def test_impossible_parameters_are_named(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**{"stop_token_ids": (1,), **wrong})  # type: ignore[arg-type]
