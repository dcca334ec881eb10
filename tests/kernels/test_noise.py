"""The keyed hash against its published form, and the noise made of it against what Gumbel noise is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_cases import chi_square_excess, expected_hash, murmur3, random_keys

from bcr_kernels import noise
from bcr_kernels.noise import gumbel_noise, keyed_hash

KEYS = st.integers(-(2**63), 2**63 - 1)
PUBLISHED = [  # of SMHasher's author and the reimplementations' common list
    (b"", 0x00000001, 0x514E28B7),
    (b"", 0xFFFFFFFF, 0x81F16F39),
    (b"\xff\xff\xff\xff", 0x00000000, 0x76293B50),
    (b"\x21\x43\x65\x87", 0x00000000, 0xF55B516B),
    (b"\x21\x43\x65\x87", 0x5082EDEE, 0x2362F9DE),
    (b"aaaa", 0x9747B28C, 0x5A97808A),
    (b"abcd", 0x9747B28C, 0xF0478627),
    ("ππππππππ".encode(), 0x9747B28C, 0xD58063C1),
]


@pytest.mark.parametrize(("data", "seed", "value"), PUBLISHED)
def test_the_oracle_gives_the_published_values(data: bytes, seed: int, value: int) -> None:
    assert murmur3(data, seed) == value


@given(KEYS, st.integers(0, 2**31 - 65), st.integers(1, 64))
def test_the_hash_is_the_published_one(key: int, first: int, count: int) -> None:
    hashed = keyed_hash(torch.tensor([key, key ^ 1]), first, count)
    assert hashed.dtype == torch.int32
    assert [value % 2**32 for value in hashed[0].tolist()] == [expected_hash(key, token) for token in range(first, first + count)]


def test_the_documented_vectors() -> None:
    """The table of docs/kernels.md: what another implementation must give."""
    vectors = {
        (0, 0): 0x63852AFC,
        (0, 151_935): 0xAE84F9D3,
        (2**63 - 1, 1): 0x30C3CF81,
        (-1, 2): 0xFE0774C4,
        (0x0123456789ABCDEF, 2): 0xB6CB5B0B,
    }
    for (key, token), value in vectors.items():
        assert int(keyed_hash(torch.tensor([key]), token, 1)) % 2**32 == value == expected_hash(key, token)


def assert_uniform(hashed: torch.Tensor) -> None:
    """Every byte of the hashes is uniform, and so are the pairs of top nibbles of neighbours."""
    words = hashed.long() % 2**32
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((words >> shift) & 0xFF, minlength=256)
        assert abs(chi_square_excess(counts, torch.full((256,), 1 / 256))) < 5
    top = words >> 28
    counts = torch.bincount(top[:-1] * 16 + top[1:], minlength=256)
    assert abs(chi_square_excess(counts, torch.full((256,), 1 / 256))) < 5


@pytest.mark.parametrize("key", [0, 1, -1, 2**32, 0x0123456789ABCDEF])
def test_uniform_over_the_vocabulary(key: int) -> None:
    assert_uniform(keyed_hash(torch.tensor([key]), 0, 151_936)[0])


@pytest.mark.parametrize("keys", ["counted", "high", "random"])
@pytest.mark.parametrize("token", [0, 77, 151_935])
def test_uniform_over_keys(keys: str, token: int) -> None:
    """Also for keys that are no hash: counted up in their low or high half."""
    count = torch.arange(100_000)
    chosen = {"counted": count, "high": count << 32, "random": random_keys(100_000)}[keys]
    assert_uniform(keyed_hash(chosen, token, 1)[:, 0])


@pytest.mark.parametrize("step", [1, 2, 2**31, 2**32, 2**63 - 1])
def test_neighbouring_keys_have_unrelated_noise(step: int) -> None:
    keys = torch.tensor([12345, 12345 + step - (2**63 if step == 2**63 - 1 else 0)])
    first, second = gumbel_noise(keys, 0, 100_000, torch.float64)
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert abs(correlation) < 5 / math.sqrt(100_000)
    assert int((first == second).sum()) <= 2  # 32-bit hashes meet by chance


def test_moments_of_the_noise() -> None:
    values = gumbel_noise(random_keys(10), 0, 100_000, torch.float64).flatten()
    deviation = math.pi / math.sqrt(6)
    assert abs(float(values.mean()) - 0.5772156649) < 5 * deviation / 1000
    assert abs(float(values.std()) - deviation) < 0.006


def test_both_tails_are_exact() -> None:
    """Against float64, from the smallest to the largest hash: the noise of the likeliest winners has no grid of float32 in it."""
    bits = torch.tensor([0, 1, 2, 100, 10**4, 2**20, 2**26, 2**30, 2**31 - 1, -(2**31), -(2**30), -100, -2, -1], dtype=torch.int32)
    uniform = (bits.double() % 2**32 + 0.5) * 2.0**-32
    exact = -torch.log(-torch.log1p(-uniform))
    actual = noise._gumbel(bits.clone())
    assert actual.dtype == torch.float32
    assert float((actual.double() - exact).abs().max()) < 2e-6
    assert float(exact.max()) > 22
    assert actual.isfinite().all()


def test_noise_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = random_keys(9)
    whole = gumbel_noise(keys, 0, 1000)
    monkeypatch.setattr(noise, "BLOCK", 1)
    assert torch.equal(gumbel_noise(keys[4:6], 300, 20), whole[4:6, 300:320])
    assert gumbel_noise(keys[:0], 0, 5).shape == (0, 5)
