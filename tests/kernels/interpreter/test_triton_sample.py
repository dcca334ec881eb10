"""The sampling kernel through Triton's interpreter: its hash, its tokens, and log-probs that are the learner's to the last bit."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import KINDS, head
from sample_cases import chi_square_excess, expected_hash, random_keys

from bcr_kernels import linear_logprob, linear_sample
from bcr_kernels._triton import backend, sample_backend, sample_kernels, tiles
from bcr_kernels._triton.tiles import Tile
from bcr_kernels.noise import gumbel_noise
from bcr_kernels.reference import materialised_logprob

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:RuntimeWarning") for message in ("overflow encountered", "invalid value", "All-NaN")
]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=[False, True], ids=["pointers", "tma"])
def tma(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(tiles, "INTERPRETER_TILE", Tile(16, 32, 16, warps=1, stages=1, group=2, tma=request.param))
    return request.param


@triton.jit
def write_noise(keys, hashed, noise, first, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    bits = sample_kernels._hash(tl.load(keys + row), first + col)
    place = row[:, None] * COLS + col[None, :]
    tl.store(hashed + place, bits.to(tl.int32, bitcast=True))
    tl.store(noise + place, sample_kernels._gumbel(bits))


@pytest.mark.parametrize("first", [0, 151_936 - 64, 2**31 - 65])
def test_the_hash_is_the_published_one_and_the_noise_that_of_the_reference(first: int) -> None:
    keys = torch.cat([random_keys(13), torch.tensor([0, -1, 2**32])])
    hashed, noise = torch.empty(16, 64, dtype=torch.int32), torch.empty(16, 64)
    write_noise[(1,)](keys, hashed, noise, first, 16, 64)
    for row, key in enumerate(keys.tolist()):
        assert [value % 2**32 for value in hashed[row].tolist()] == [expected_hash(key, first + col) for col in range(64)]
    in_nats = torch.log(torch.tensor(2.0)) * noise - torch.log(torch.log(torch.tensor(2.0)))  # less the constant that the kernel leaves out
    assert float((in_nats - gumbel_noise(keys, first, 64)).abs().max()) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_reference(kind: str, dtype: torch.dtype, tma: bool) -> None:
    """Width 40 and vocabulary 77: neither fills its tiles. Greedy and sampled rows in one call."""
    hidden, weight, _ = head(kind, 37, 40, 77, dtype)
    tau = torch.linspace(0.3, 2.0, 37)
    tau[::5] = 0
    actual = linear_sample(hidden, weight, random_keys(37), temperature=tau, backend="triton")
    expected = linear_sample(hidden, weight, random_keys(37), temperature=tau, backend="reference")
    assert torch.equal(actual.token, expected.token)
    exact = materialised_logprob(hidden.double(), weight.double(), actual.token, torch.where(tau == 0, 1, tau).double())
    assert float((actual.logprob - exact.logprob).abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_the_logprob_is_that_of_the_learner(dtype: torch.dtype, temperature: float, tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, for the same hidden states in another batch, in another order, and in the learner's chunks."""
    hidden, weight, targets = head("spread", 40, 32, 101, dtype)
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:20]
    sampled = linear_sample(hidden[rows], weight, random_keys(20), temperature=temperature, backend="triton")
    targets[rows] = sampled.token
    for chunk in (8192, 7):
        monkeypatch.setattr(backend, "FORWARD_ROWS", chunk)
        learner = linear_logprob(hidden, weight, targets, temperature=temperature or 1.0, with_entropy=True, backend="triton")
        assert torch.equal(sampled.logprob, learner.logprob[rows])


def test_tokens_do_not_depend_on_batch_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = head("spread", 40, 32, 101, torch.bfloat16)
    keys = random_keys(40)
    whole = linear_sample(hidden, weight, keys, backend="triton")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    permuted = linear_sample(hidden[order], weight, keys[order], backend="triton")
    monkeypatch.setattr(sample_backend, "FORWARD_ROWS", 7)
    chunked = linear_sample(hidden, weight, keys, backend="triton", with_logprob=False)
    assert torch.equal(permuted.token, whole.token[order])
    assert torch.equal(permuted.logprob, whole.logprob[order])
    assert torch.equal(chunked.token, whole.token)
    assert chunked.logprob is None


def test_sampling_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = head("peaked", 2, 16, 70, torch.float32)
    monkeypatch.setattr(tiles, "INTERPRETER_TILE", Tile(64, 128, 16, warps=1, stages=1))
    probabilities = torch.softmax(hidden[1].double() @ weight.double().t(), 0)
    draws = linear_sample(hidden[1:].expand(1600, 16), weight, random_keys(1600), backend="triton", with_logprob=False).token
    assert chi_square_excess(torch.bincount(draws, minlength=70), probabilities) < 4


def test_ties_go_to_the_lowest_id() -> None:
    """Within a tile and across tiles (of 32 columns)."""
    hidden, weight = torch.ones(3, 4), torch.zeros(100, 4)
    for ids in ([7, 9, 99], [40, 70], [99], list(range(100))):
        weight[:] = 0
        weight[ids] = 1
        assert linear_sample(hidden, weight, random_keys(3), temperature=0, backend="triton").token.tolist() == [ids[0]] * 3


def test_the_padding_of_a_tile_is_never_drawn() -> None:
    """All logits near -96 in a vocabulary that fills no tile: padding columns with logit 0 would win every time."""
    hidden, weight, _ = head("negative", 20, 16, 37, torch.float32)
    tokens = linear_sample(hidden, weight, random_keys(20), backend="triton").token
    assert bool((tokens < 37).all())
    assert tokens.unique().numel() > 5


@pytest.mark.parametrize("rows", [0, 1, 16, 17])
@pytest.mark.parametrize("vocab", [1, 33])
def test_few_rows_and_entries(rows: int, vocab: int) -> None:
    hidden, weight = torch.randn(rows, 8), torch.randn(vocab, 8)
    sampled = linear_sample(hidden, weight, random_keys(rows), backend="triton")
    assert torch.equal(sampled.token, linear_sample(hidden, weight, random_keys(rows), backend="reference").token)
    assert sampled.logprob.shape == (rows,)


def test_nan_stays_in_its_row() -> None:
    hidden, weight, _ = head("peaked", 6, 16, 37, torch.float32)
    hidden[2, 3] = float("nan")
    sampled = linear_sample(hidden, weight, random_keys(6), backend="triton")
    assert sampled.logprob.isnan().tolist() == [False, False, True, False, False, False]
    assert bool(((sampled.token >= 0) & (sampled.token < 37)).all())
