"""The policy-loss pipeline through Triton's interpreter."""

import pytest
import torch
from kernel_cases import KINDS, RULES, check_policy, head, largest_error, leaves, moved, policy_arguments, relative_error

from bcr_kernels import LossRule, linear_policy_loss
from bcr_kernels._triton import backend, kernels, tiles
from bcr_kernels._triton.tiles import Tile
from bcr_kernels.reference import materialised_logprob

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind: str, dtype: torch.dtype) -> None:
    """In "spread", targets lie up to 140 nats below the maximum: kept exponentials are rescued too."""
    check_policy(*head(kind, 37, 40, 77, dtype), RULES["clip"], 0.9, backend="triton")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule(rule: LossRule) -> None:
    check_policy(*head("peaked", 30, 32, 70, torch.bfloat16), rule, 0.7, backend="triton")


@pytest.mark.parametrize("vocab", [1187, 50_257, 151_936])
def test_vocabularies(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "INTERPRETER_TILE", Tile(16, 4096, 32, warps=1, stages=1, tma=True))
    check_policy(*head("spread", 6, 32, vocab, torch.bfloat16), RULES["all"], backend="triton")


@pytest.mark.parametrize("gap", [30.0, 44.0, 60.0, 80.0, 95.0])
def test_targets_far_below_the_maximum(gap: float) -> None:
    """S is e^gap: kept exponentials and 1 / S are still multiplied without underflow, with per-token weights as small as 1e-6."""
    hidden, weight, _ = head("peaked", 18, 16, 70, torch.float32)
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    weight[3, 0] = gap
    check_policy(hidden, weight, torch.full((18,), 69), RULES["clip"], backend="triton", scale=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_does_not_grow_with_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = head("peaked", 64, 32, 96, dtype)
    errors = []
    for rows in (64, 1):
        monkeypatch.setattr(tiles, "chunk_rows", lambda *_, rows=rows: rows)
        errors.append(check_policy(hidden, weight, targets, RULES["kl"], backend="triton"))
    for name in errors[0]:
        assert errors[1][name] <= 1.5 * errors[0][name] + 2e-6, name


def prepared(dtype: torch.dtype = torch.float32) -> tuple:
    hidden, weight, targets = head("peaked", 24, 16, 53, dtype)
    arguments = policy_arguments(materialised_logprob(hidden.double(), weight.double(), targets).logprob, RULES["clip"])
    return hidden, weight, targets, moved(arguments, "cpu", torch.float32)


def test_inactive_tokens_never_enter_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    original = backend._anchored_softmax
    monkeypatch.setattr(backend, "_anchored_softmax", lambda hidden, *rest: rows.append(hidden.shape[0]) or original(hidden, *rest))
    hidden, weight, targets, arguments = prepared()
    arguments["segment_ids"][:] = -1
    arguments["segment_ids"][[3, 9]] = 1
    h, w = leaves(hidden, weight)
    linear_policy_loss(h, w, targets, **arguments, backend="triton").loss.backward()
    assert rows == [2]
    assert set(h.grad.abs().sum(1).nonzero().flatten().tolist()) <= {3, 9}

    arguments["segment_ids"][:] = -1
    h.grad = w.grad = None
    out = linear_policy_loss(h, w, targets, **arguments, with_entropy=True, backend="triton")
    out.loss.backward()
    assert rows == [2]
    assert h.grad.eq(0).all()
    assert w.grad.eq(0).all()


def test_gradients_and_entropy_equal_the_reference() -> None:
    hidden, weight, targets, arguments = prepared()
    accumulator = torch.zeros(weight.shape)
    h, w = leaves(hidden, weight)
    h2, w2 = leaves(hidden, weight)
    out = linear_policy_loss(h, w, targets, **arguments, with_entropy=True, weight_grad_accumulator=accumulator, backend="triton")
    expected = linear_policy_loss(h2, w2, targets, **arguments, with_entropy=True, backend="reference")
    (2 * out.loss).backward()
    (2 * expected.loss).backward()
    assert w.grad is None
    assert relative_error(h.grad, h2.grad) < 1e-5
    assert relative_error(accumulator, w2.grad) < 1e-5
    assert out.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert float(out.metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), name


def test_without_gradients_no_exponential_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, arguments = prepared()
    (h,) = leaves(hidden)
    expected = linear_policy_loss(h, weight, targets, **arguments, backend="triton")
    monkeypatch.setattr(backend, "_chunk_buffer", None)
    with torch.no_grad():
        out = linear_policy_loss(h, weight, targets, **arguments, backend="triton")
    assert largest_error(out.loss, expected.loss) < 1e-6


def test_repeated_calls_are_bitwise_equal() -> None:
    hidden, weight, targets, arguments = prepared(torch.bfloat16)
    targets[:12] = targets[0]  # rows of the weight gradient that many tokens add to
    runs = []
    for _ in range(2):
        h, w = leaves(hidden, weight)
        out = linear_policy_loss(h, w, targets, **arguments, backend="triton")
        out.loss.backward()
        runs.append((out.loss, out.logprobs, h.grad, w.grad))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_kept_exponentials_are_rounded_to_nearest() -> None:
    """The interpreter cuts bits off when it stores a bfloat16; the kernels round as the hardware does."""
    hidden, weight, targets = head("peaked", 16, 16, 32, torch.float32)
    kept = [torch.empty(16, 32, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    for stored in kept:
        kernels.exponentials_kernel[(1,)](
            hidden, weight, targets, torch.ones(16), torch.zeros(16), stored, torch.empty(1, 1, 16), 16, 32,
            WIDTH=16, PITCH=32, ROWS=16, COLS=32, DEPTH=16, GROUP=1, TMA=False, STORE=True, ENTROPY=False,
        )  # fmt: skip
    assert torch.equal(kept[0].bfloat16(), kept[1])


def test_chunks_fill_whole_waves() -> None:
    """Bytes per row of V = 151,936 in bfloat16; 132 processors."""
    row_bytes = 152_064 * 2
    assert tiles.chunk_rows(1536, row_bytes, 132) == 2816
    assert tiles.chunk_rows(2560, row_bytes, 132) == 1664
    assert tiles.chunk_rows(1536, 10**12, 132) == 128
    for width in (64, 1024, 4096, 8192):
        rows = tiles.chunk_rows(width, row_bytes, 132)
        assert rows % 128 == 0
        assert rows * row_bytes <= tiles.CHUNK_BYTES
    assert tiles.nearest_tile((8, 9), torch.bfloat16) == tiles.TILES[(8, 6), torch.bfloat16]
    assert tiles.nearest_tile((10, 3), torch.bfloat16) == tiles.TILES[(10, 0), torch.bfloat16]
    with pytest.raises(ValueError, match=r"^backend: is 'triton', which has no tile"):
        tiles.nearest_tile((7, 5), torch.bfloat16)
