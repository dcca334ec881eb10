"""The log-prob kernels through Triton's interpreter: what they compute, not how fast."""

import pytest
import torch
from kernel_cases import KINDS, check_logprob, check_phantom_mass, head, largest_error, leaves, relative_error

from bcr_kernels import linear_logprob
from bcr_kernels._triton import backend, kernels, tiles
from bcr_kernels._triton.tiles import Tile
from bcr_kernels.reference import materialised_logprob

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
DTYPES = (torch.float32, torch.bfloat16)
WIDE_TILE = Tile(16, 4096, 32, warps=1, stages=1)  # few programs for a real vocabulary


@pytest.fixture(params=[False, True], ids=["pointers", "tma"])
def tma(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(tiles, "INTERPRETER_TILE", Tile(16, 32, 16, warps=1, stages=1, group=2, tma=request.param))
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind: str, dtype: torch.dtype, tma: bool) -> None:
    """Width 40 and vocabulary 77: neither fills its tiles."""
    check_logprob(*head(kind, 37, 40, 77, dtype), 0.9, backend="triton")


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(37, torch.float32), (1187, torch.bfloat16), (50_257, torch.float32), (50_257, torch.bfloat16), (151_936, torch.bfloat16)],
)
def test_vocabularies(vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "INTERPRETER_TILE", WIDE_TILE)
    check_logprob(*head("spread", 5, 32, vocab, dtype), 0.7, backend="triton")
    check_phantom_mass(min(vocab, 50_257), dtype, backend="triton")


def test_unaligned_rows_fall_back_to_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width of 37 bfloat16 is 74 bytes: TMA would refuse it."""
    monkeypatch.setattr(tiles, "INTERPRETER_TILE", Tile(16, 32, 16, warps=1, stages=1, tma=True))
    check_logprob(*head("peaked", 20, 37, 50, torch.bfloat16), backend="triton")


@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17])
def test_any_number_of_tokens(tokens: int) -> None:
    hidden, weight, targets = head("peaked", tokens, 16, 37, torch.float32)
    h, w = leaves(hidden, weight)
    result = linear_logprob(h, w, targets, with_entropy=True, backend="triton")
    torch.stack([part.sum() for part in result]).sum().backward()
    expected = linear_logprob(hidden, weight, targets, with_entropy=True, backend="reference")
    for part, other in zip(result, expected, strict=True):
        assert part.shape == (tokens,)
        assert largest_error(part, other) < 3e-5
    assert h.grad.shape == hidden.shape


@pytest.mark.parametrize("with_entropy", [False, True])
def test_one_temperature_per_token_and_ignored_targets(with_entropy: bool) -> None:
    hidden, weight, targets = head("peaked", 20, 32, 101, torch.float32)
    targets[[0, 7, 19]] = -100
    temperature = torch.linspace(0.3, 2.0, 20)
    h, w = leaves(hidden, weight)
    h2, w2 = leaves(hidden, weight)
    result = linear_logprob(h, w, targets, temperature=temperature, with_entropy=with_entropy, backend="triton")
    expected = linear_logprob(h2, w2, targets, temperature=temperature, with_entropy=with_entropy, backend="reference")
    (result.logprob - 0.3 * result.logsumexp).sum().backward()
    (expected.logprob - 0.3 * expected.logsumexp).sum().backward()
    assert (result.entropy is None) == (not with_entropy)
    assert largest_error(result.logprob, expected.logprob) < 1e-5
    assert relative_error(h.grad, h2.grad) < 1e-5
    assert relative_error(w.grad, w2.grad) < 1e-5


@pytest.mark.parametrize("gap", [30.0, 44.0, 60.0, 87.0, 95.0, 300.0])
def test_targets_far_below_the_maximum(gap: float) -> None:
    """exp(gap) overflows float32 from 88.7 on; those rows, and no others, are done again."""
    hidden, weight, _ = head("peaked", 18, 16, 70, torch.float32)
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    weight[69, 0] = 0.0
    weight[3, 0] = gap  # every row has its maximum at 3
    targets = torch.full((18,), 3)
    targets[[2, 17]] = 69
    check_logprob(hidden, weight, targets, backend="triton")


def test_rescue_leaves_the_other_rows_alone() -> None:
    hidden, weight, targets = head("peaked", 18, 16, 70, torch.float32)
    before = linear_logprob(hidden, weight, targets, with_entropy=True, backend="triton")
    hidden[4] *= 0
    hidden[4, 0], weight_with_peak = 1.0, weight.clone()
    weight_with_peak[5 if targets[4] != 5 else 6, 0] = 500.0
    others = [row for row in range(18) if row != 4]
    after = linear_logprob(hidden * torch.tensor([0.0] + [1.0] * 15), weight, targets, backend="triton")
    rescued_hidden = hidden * torch.tensor([0.0] + [1.0] * 15)
    rescued_hidden[4, 0] = 1.0
    rescued = linear_logprob(rescued_hidden, weight_with_peak, targets, backend="triton")
    assert rescued.logprob[4] < -400
    assert torch.equal(rescued.logprob[others], after.logprob[others])
    assert before.logprob.isfinite().all()


def test_nan_stays_in_its_row() -> None:
    hidden, weight, targets = head("peaked", 18, 16, 70, torch.float32)
    hidden[3, 2] = float("nan")
    result = linear_logprob(hidden, weight, targets, with_entropy=True, backend="triton")
    for part in result:
        assert part.isnan().nonzero().flatten().tolist() == [3]


def test_a_target_out_of_range_reads_nothing() -> None:
    """On CUDA the values of targets are not checked: the kernel gives NaN, and leaves the memory beside the weight alone."""
    hidden, weight, _ = head("peaked", 4, 16, 8, torch.float32)
    targets = torch.tensor([1, 8, -3, 2**40])
    out = torch.zeros(4)
    kernels.target_logit_kernel[(1,)](hidden, weight, targets, torch.ones(4), out, 4, 8, 16, 16, 128)
    assert out.isnan().tolist() == [False, True, True, True]
    assert out[0] == pytest.approx(float(hidden[0] @ weight[1]), rel=1e-5)


def test_logprobs_do_not_depend_on_batch_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise: permuted rows, a subset, and smaller chunks."""
    hidden, weight, targets = head("spread", 40, 32, 101, torch.bfloat16)
    expected = linear_logprob(hidden, weight, targets, with_entropy=True, backend="triton")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    permuted = linear_logprob(hidden[order], weight, targets[order], with_entropy=True, backend="triton")
    monkeypatch.setattr(backend, "FORWARD_ROWS", 7)
    chunked = linear_logprob(hidden, weight, targets, with_entropy=True, backend="triton")
    for part, other, third in zip(expected, permuted, chunked, strict=True):
        assert torch.equal(part[order], other)
        assert torch.equal(part, third)


def test_repeated_calls_are_bitwise_equal() -> None:
    hidden, weight, targets = head("spread", 20, 32, 101, torch.bfloat16)
    runs = []
    for _ in range(2):
        h, w = leaves(hidden, weight)
        result = linear_logprob(h, w, targets, with_entropy=True, backend="triton")
        torch.stack([part.sum() for part in result]).sum().backward()
        runs.append((*result, h.grad, w.grad))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_has_no_gradient(frozen: str) -> None:
    hidden, weight, targets = head("peaked", 8, 16, 37, torch.float32)
    h, w = leaves(hidden, weight)
    exact_h, exact_w = leaves(hidden, weight, dtype=torch.float64)
    (h if frozen == "hidden" else w).requires_grad_(False)
    linear_logprob(h, w, targets, backend="triton").logprob.sum().backward()
    materialised_logprob(exact_h, exact_w, targets).logprob.sum().backward()
    assert (h.grad is None) == (frozen == "hidden")
    assert (w.grad is None) == (frozen == "weight")
    assert relative_error(*((w.grad, exact_w.grad) if frozen == "hidden" else (h.grad, exact_h.grad))) < 1e-5


def test_weight_may_be_a_transposed_view() -> None:
    hidden, weight, targets = head("peaked", 8, 16, 37, torch.float32)
    stored = weight.t().contiguous()
    result = linear_logprob(hidden, stored.t(), targets, backend="triton")
    assert torch.equal(result.logprob, linear_logprob(hidden, weight, targets, backend="triton").logprob)


def test_offsets_beyond_31_bits() -> None:
    """Row 15 of a chunk whose rows are 2^28 long begins at element 4.0e9. The memory is reserved, and touched only at the tile."""
    rows, vocab, pitch = 16, 32, 2**28
    hidden, weight, targets = head("peaked", rows, 16, vocab, torch.bfloat16)
    far, near = torch.empty(rows, pitch, dtype=torch.bfloat16), torch.empty(rows, vocab, dtype=torch.bfloat16)
    scale, anchor = torch.ones(rows), torch.zeros(rows)
    for stored in (far, near):
        kernels.exponentials_kernel[(1,)](
            hidden, weight, targets, scale, anchor, stored, torch.empty(1, 1, rows), rows, vocab,
            WIDTH=16, PITCH=stored.shape[1], ROWS=16, COLS=32, DEPTH=16, GROUP=1, TMA=False, STORE=True, ENTROPY=False,
        )  # fmt: skip
    assert torch.equal(far[:, :vocab], near)
    assert near.float().abs().sum() > 0


@pytest.mark.parametrize("rows", [1, 16, 17, 100, 129])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_tile_is_made_once(rows: int, group: int) -> None:
    """The grouped order of programs is a permutation of the tiles: all partial sums are written, and each is right."""
    hidden, weight = torch.ones(rows, 16), torch.zeros(70, 16)
    partials = torch.full((1, 3, rows), float("nan"))
    tiles_made = -(-rows // 16) * 3
    kernels.exponentials_kernel[(tiles_made,)](
        hidden, weight, torch.zeros(rows, dtype=torch.int64), torch.ones(rows), torch.zeros(rows), hidden, partials, rows, 70,
        WIDTH=16, PITCH=1, ROWS=16, COLS=32, DEPTH=16, GROUP=group, TMA=False, STORE=False, ENTROPY=False,
    )  # fmt: skip
    assert partials[0, :, 0].tolist() == [31.0, 32.0, 6.0]  # exp2(0) for every column but the target
    assert partials.eq(partials[:, :, :1]).all()
