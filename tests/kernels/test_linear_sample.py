"""`linear_sample` on the reference backend: its distribution, its log-probs, its ties and its refusals."""

from typing import Any

import pytest
import torch
from kernel_cases import head
from sample_cases import chi_square_excess, random_keys

from bcr_kernels import linear_logprob, linear_sample, reference
from bcr_kernels.noise import gumbel_noise
from bcr_kernels.reference import materialised_logprob

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
def test_sampling_distribution(dtype: torch.dtype, temperature: float) -> None:
    """60,000 draws from one row, against softmax in float64 of the rounded inputs."""
    hidden, weight, _ = head("peaked", 2, 16, 300, dtype)
    probabilities = torch.softmax(hidden[1].double() @ weight.double().t() / temperature, 0)
    counts = torch.zeros(300, dtype=torch.int64)
    for seed in range(3):
        draws = linear_sample(hidden[1:].expand(20_000, 16), weight, random_keys(20_000, seed), temperature=temperature).token
        counts += torch.bincount(draws, minlength=300)
    assert chi_square_excess(counts, probabilities) < 4
    assert chi_square_excess(counts, torch.softmax(hidden[0].double() @ weight.double().t(), 0)) > 50, "the test has no power"


def test_distribution_over_positions_of_one_rollout() -> None:
    """Keys that were counted up rather than hashed: still the right distribution."""
    weight = torch.log(torch.tensor([[0.5], [0.3], [0.15], [0.05]]))
    draws = linear_sample(torch.ones(40_000, 1), weight, torch.arange(40_000)).token
    assert abs(chi_square_excess(torch.bincount(draws, minlength=4), weight.exp()[:, 0])) < 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", ["one", "kept", "made again"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "rows"])
def test_the_logprob_is_that_of_the_learner(dtype: torch.dtype, blocks: str, temperature: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise that of `linear_logprob` for the sampled token, however the logits are blocked; and within 1e-4 of float64."""
    if blocks != "one":
        monkeypatch.setattr(reference, "FORWARD_ROWS", 16)
        monkeypatch.setattr(reference, "FORWARD_ELEMENTS", 16 * 100)
    if blocks == "made again":
        monkeypatch.setattr(reference, "POLICY_ELEMENTS", 0)
    hidden, weight, _ = head("spread", 37, 40, 777, dtype)
    tau = torch.linspace(0.3, 2.0, 37) if temperature == "rows" else temperature
    sampled = linear_sample(hidden, weight, random_keys(37), temperature=tau)
    assert sampled.token.dtype == torch.int64
    assert sampled.logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(sampled.logprob, linear_logprob(hidden, weight, sampled.token, temperature=tau).logprob)
    exact = materialised_logprob(hidden.double(), weight.double(), sampled.token, tau.double() if temperature == "rows" else tau)
    assert float((sampled.logprob - exact.logprob).abs().max()) < 1e-4
    assert torch.equal(linear_sample(hidden, weight, random_keys(37), temperature=tau, with_logprob=False).token, sampled.token)


def test_blocks_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = head("spread", 37, 40, 777, torch.float64)
    whole = linear_sample(hidden, weight, random_keys(37))
    monkeypatch.setattr(reference, "FORWARD_ROWS", 5)
    monkeypatch.setattr(reference, "FORWARD_ELEMENTS", 5 * 64)
    assert torch.equal(linear_sample(hidden, weight, random_keys(37)).token, whole.token)


def test_a_token_is_a_function_of_its_row_and_key() -> None:
    hidden, weight, _ = head("peaked", 40, 16, 101, torch.float64)
    keys = random_keys(40)
    whole = linear_sample(hidden, weight, keys).token
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear_sample(hidden[order], weight, keys[order]).token, whole[order])
    assert torch.equal(linear_sample(hidden[7:8], weight, keys[7:8]).token, whole[7:8])
    assert not torch.equal(linear_sample(hidden, weight, keys + 1).token, whole)


def test_noise_is_added_to_the_scaled_logits() -> None:
    """The definition, in float64: the argmax of z / temperature + noise."""
    hidden, weight, _ = head("peaked", 200, 16, 101, torch.float64)
    keys = random_keys(200)
    scores = hidden @ weight.t() / 1.3 + gumbel_noise(keys, 0, 101, torch.float64)
    assert torch.equal(linear_sample(hidden, weight, keys, temperature=1.3).token, scores.argmax(1))


def test_temperature_zero_is_greedy_with_logprobs_at_one() -> None:
    hidden, weight, _ = head("peaked", 20, 16, 101, torch.float32)
    logprobs = torch.log_softmax(hidden.double() @ weight.double().t(), 1)
    greedy = linear_sample(hidden, weight, random_keys(20), temperature=0)
    assert torch.equal(greedy.token, logprobs.argmax(1))
    assert torch.equal(greedy.logprob, linear_logprob(hidden, weight, greedy.token).logprob)
    mixed = torch.ones(20)
    mixed[::2] = 0
    both = linear_sample(hidden, weight, random_keys(20), temperature=mixed)
    sampled = linear_sample(hidden, weight, random_keys(20), temperature=1.0)
    assert torch.equal(both.token, torch.where(mixed == 0, greedy.token, sampled.token))
    assert torch.equal(both.logprob, torch.where(mixed == 0, greedy.logprob, sampled.logprob))
    assert not torch.equal(greedy.token, sampled.token)


def test_ties_go_to_the_lowest_id(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.ones(3, 4), torch.zeros(50, 4)
    weight[[7, 30, 49]] = 1.0
    for elements in (reference.FORWARD_ELEMENTS, 3 * 8):
        monkeypatch.setattr(reference, "FORWARD_ELEMENTS", elements)
        assert linear_sample(hidden, weight, random_keys(3), temperature=0.0).token.tolist() == [7, 7, 7]


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("vocab", [1, 37])
def test_few_rows_and_entries(rows: int, vocab: int) -> None:
    sampled = linear_sample(torch.randn(rows, 8), torch.randn(vocab, 8), random_keys(rows))
    assert sampled.token.shape == sampled.logprob.shape == (rows,)
    assert bool((sampled.token < vocab).all())
    if vocab == 1:
        assert sampled.logprob.eq(0).all()


def test_nan_stays_in_its_row() -> None:
    hidden, weight, _ = head("peaked", 6, 16, 37, torch.float32)
    expected = linear_sample(hidden, weight, random_keys(6))
    hidden[2, 3] = float("nan")
    sampled = linear_sample(hidden, weight, random_keys(6))
    assert sampled.logprob.isnan().tolist() == [False, False, True, False, False, False]
    assert bool(((sampled.token >= 0) & (sampled.token < 37)).all())
    others = [0, 1, 3, 4, 5]
    assert torch.equal(sampled.token[others], expected.token[others])


def test_no_gradient_and_a_transposed_weight() -> None:
    hidden, weight, _ = head("peaked", 6, 16, 37, torch.float32)
    stored = weight.t().contiguous().requires_grad_()
    sampled = linear_sample(hidden.requires_grad_(), stored.t(), random_keys(6))
    assert not sampled.logprob.requires_grad
    assert torch.equal(sampled.token, linear_sample(hidden, weight, random_keys(6)).token)


GOOD: dict[str, Any] = {"hidden": torch.randn(4, 8), "weight": torch.randn(11, 8), "keys": torch.arange(4)}
BAD = [
    ("hidden", torch.randn(8)),
    ("hidden", torch.randn(4, 8, dtype=torch.float16)),
    ("weight", torch.randn(11, 9)),
    ("weight", torch.randn(0, 8)),
    ("weight", torch.randn(11, 8, dtype=torch.float64)),
    ("weight", torch.empty(1, 8).expand(2**31, 8)),
    ("keys", torch.arange(5)),
    ("keys", torch.arange(4, dtype=torch.int32)),
    ("keys", torch.zeros(4)),
    ("keys", [1, 2, 3, 4]),
    ("keys", torch.arange(4, device="meta")),
    ("temperature", -0.5),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "warm"),
    ("temperature", torch.ones(3)),
    ("temperature", torch.tensor([1.0, -1.0, 0.0, 1.0])),
    ("temperature", torch.tensor([1.0, float("inf"), 0.0, 1.0])),
    ("temperature", torch.ones(4, dtype=torch.int64)),
    ("backend", "cuda"),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{index}" for index, (name, _) in enumerate(BAD)])
def test_bad_input_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        linear_sample(**(GOOD | {name: value}))
