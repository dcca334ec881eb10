"""`linear_logprob` on the reference backend: the definition in float64 is the judge."""

import pytest
import torch
from kernel_cases import GRADIENT_TOLERANCE, KINDS, check_logprob, check_phantom_mass, head, largest_error, leaves, relative_error

from bcr_kernels import LossRule, linear_logprob, linear_policy_loss, reference
from bcr_kernels.reference import materialised_logprob

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [37, 1187])
def test_against_float64(kind: str, vocab: int, dtype: torch.dtype) -> None:
    check_logprob(*head(kind, 21, 48, vocab, dtype), backend="reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [50_257, 151_936])
def test_real_vocabularies(vocab: int, dtype: torch.dtype) -> None:
    check_logprob(*head("spread", 3, 32, vocab, dtype), 0.7, backend="reference")


def test_float64_is_exact() -> None:
    hidden, weight, targets = head("spread", 13, 16, 77, torch.float64)
    errors = check_logprob(hidden, weight, targets, 1.3, backend="reference")
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_temperature_per_token(dtype: torch.dtype) -> None:
    hidden, weight, targets = head("peaked", 20, 32, 101, dtype)
    temperature = torch.linspace(0.3, 2.0, 20)
    check_logprob(hidden, weight, targets, temperature, backend="reference")
    per_token = linear_logprob(hidden, weight, targets, temperature=torch.full((20,), 0.7), backend="reference")
    scalar = linear_logprob(hidden, weight, targets, temperature=0.7, backend="reference")
    assert largest_error(per_token.logprob, scalar.logprob) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_phantom_mass_beyond_the_vocabulary(dtype: torch.dtype) -> None:
    for vocab in (37, 151_936):
        check_phantom_mass(vocab, dtype, backend="reference")


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
def test_any_number_of_tokens(tokens: int) -> None:
    hidden, weight, targets = head("spread", tokens, 16, 37, torch.float32)
    h, w = leaves(hidden, weight)
    result = linear_logprob(h, w, targets, with_entropy=True, backend="reference")
    assert all(part.shape == (tokens,) and part.dtype == torch.float32 for part in result)
    result.logprob.sum().backward()
    assert h.grad.shape == hidden.shape
    assert w.grad.abs().sum() > 0 or tokens == 0


def test_ignored_targets_are_zero_and_without_gradient() -> None:
    hidden, weight, targets = head("peaked", 12, 16, 37, torch.float32)
    targets[[0, 5, 11]] = -100
    hidden[5] = float("nan")  # never read
    h, w = leaves(hidden, weight)
    result = linear_logprob(h, w, targets, with_entropy=True, backend="reference")
    torch.stack([part.sum() for part in result]).sum().backward()
    assert all(part[[0, 5, 11]].eq(0).all() for part in result)
    assert h.grad[[0, 5, 11]].eq(0).all()
    assert h.grad.isfinite().all()
    assert w.grad.isfinite().all()
    kept = targets != -100
    alone = linear_logprob(hidden[kept], weight, targets[kept], backend="reference")
    assert torch.equal(result.logprob[kept], alone.logprob)

    h.grad = w.grad = None
    linear_logprob(h, w, torch.full_like(targets, -100), backend="reference").logprob.sum().backward()
    assert h.grad.eq(0).all()
    assert w.grad.eq(0).all()


def test_ignored_targets_never_enter_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    original = reference.matmul
    monkeypatch.setattr(reference, "matmul", lambda a, b: rows.append(a.shape[0]) or original(a, b))
    hidden, weight, targets = head("peaked", 40, 16, 37, torch.float32)
    targets[:9] = -100
    linear_logprob(hidden, weight, targets, backend="reference")
    assert rows == [31]


@pytest.mark.parametrize("active_tokens", [None, 9])
def test_a_known_count_changes_nothing(active_tokens: int | None) -> None:
    hidden, weight, targets = head("peaked", 12, 16, 37, torch.float32)
    expected = linear_logprob(hidden, weight, targets, backend="reference").logprob
    targets[[1, 2, 7]] = -100
    result = linear_logprob(hidden, weight, targets, active_tokens=active_tokens, backend="reference").logprob
    kept = targets != -100
    assert largest_error(result[kept], expected[kept]) < 1e-5
    assert result[~kept].eq(0).all()


def test_nan_stays_in_its_row() -> None:
    hidden, weight, targets = head("peaked", 6, 16, 37, torch.float32)
    expected = linear_logprob(hidden, weight, targets, backend="reference").logprob
    hidden[2, 3] = float("nan")
    result = linear_logprob(hidden, weight, targets, with_entropy=True, backend="reference")
    assert all(part.isnan().tolist() == [False, False, True, False, False, False] for part in result)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(result.logprob[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_does_not_grow_with_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = head("peaked", 64, 32, 512, dtype)
    errors = []
    for rows, elements in ((64, 64 * 512), (1, 512), (1, 8)):  # 1 chunk, 64 chunks of rows, 64 x 64 blocks
        monkeypatch.setattr(reference, "FORWARD_ROWS", rows)
        monkeypatch.setattr(reference, "FORWARD_ELEMENTS", elements)
        errors.append(check_logprob(hidden, weight, targets, backend="reference"))
    for name in errors[0]:
        assert max(error[name] for error in errors) <= 1.5 * errors[0][name] + 2e-6, name


def test_repeated_calls_are_bitwise_equal() -> None:
    hidden, weight, targets = head("spread", 40, 32, 1187, torch.bfloat16)
    runs = []
    for _ in range(2):
        h, w = leaves(hidden, weight)
        result = linear_logprob(h, w, targets, with_entropy=True, backend="reference")
        torch.stack([part.sum() for part in result]).sum().backward()
        runs.append((*result, h.grad, w.grad))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("which", ["logprob", "entropy", "logsumexp"])
def test_each_result_has_its_own_gradient(which: str) -> None:
    """Entropy alone, say: the outputs that are not used give no gradient and need none."""
    hidden, weight, targets = head("peaked", 9, 16, 37, torch.float64)
    h, w = leaves(hidden, weight)
    exact_h, exact_w = leaves(hidden, weight)
    getattr(linear_logprob(h, w, targets, with_entropy=True, backend="reference"), which).sum().backward()
    getattr(materialised_logprob(exact_h, exact_w, targets), which).sum().backward()
    assert relative_error(h.grad, exact_h.grad) < 1e-12
    assert relative_error(w.grad, exact_w.grad) < 1e-12


def test_gradcheck() -> None:
    hidden, weight, targets = head("peaked", 4, 5, 7, torch.float64)
    targets[1] = -100

    def parts(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(linear_logprob(h, w, targets, temperature=0.8, with_entropy=True, backend="reference"))

    assert torch.autograd.gradcheck(parts, tuple(leaves(hidden / 3, weight)))


@pytest.mark.parametrize("upstream", ["expanded", "strided", "scaled"])
def test_upstream_gradients_of_any_form(upstream: str) -> None:
    hidden, weight, targets = head("peaked", 8, 16, 37, torch.float32)
    gradient = {
        "expanded": torch.tensor(2.5).expand(8),
        "strided": torch.arange(16.0)[::2],
        "scaled": torch.full((8,), 1e-4),
    }[upstream]
    h, w = leaves(hidden, weight)
    exact_h, exact_w = leaves(hidden, weight, dtype=torch.float64)
    linear_logprob(h, w, targets, backend="reference").logprob.backward(gradient)
    materialised_logprob(exact_h, exact_w, targets).logprob.backward(gradient.double())
    assert relative_error(h.grad, exact_h.grad) < 1e-5
    assert relative_error(w.grad, exact_w.grad) < 1e-5


def test_a_second_backward_gives_the_same() -> None:
    hidden, weight, targets = head("peaked", 8, 16, 37, torch.float32)
    h, w = leaves(hidden, weight)
    loss = linear_logprob(h, w, targets, backend="reference").logprob.sum()
    loss.backward(retain_graph=True)
    first = h.grad.clone(), w.grad.clone()
    h.grad = w.grad = None
    loss.backward()
    assert torch.equal(h.grad, first[0])
    assert torch.equal(w.grad, first[1])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_skips_its_product(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    original = reference.matmul_add_
    monkeypatch.setattr(reference, "matmul_add_", lambda total, a, b: products.append(total.shape) or original(total, a, b))
    hidden, weight, targets = head("peaked", 8, 16, 37, torch.float32)
    h, w = leaves(hidden, weight)
    (h if frozen == "hidden" else w).requires_grad_(False)
    linear_logprob(h, w, targets, backend="reference").logprob.sum().backward()
    assert products == [weight.shape if frozen == "hidden" else hidden.shape]
    assert (h if frozen == "hidden" else w).grad is None


def test_weight_may_be_a_transposed_view_and_tied() -> None:
    """A head stored [H, V], whose transpose is also the embedding that makes the hidden states."""
    stored = torch.randn(16, 37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets, inputs = torch.tensor([3, 9, 30, 3]), torch.tensor([1, 3, 3, 8])
    gradients = []
    for function in (lambda *a: linear_logprob(*a, backend="reference"), materialised_logprob):
        (table,) = leaves(stored)
        hidden = torch.nn.functional.embedding(inputs, table.t())
        function(hidden, table.t(), targets).logprob.sum().backward()
        gradients.append(table.grad)
    assert relative_error(*gradients) < 1e-12


def test_autocast_and_global_precision_change_nothing() -> None:
    """bfloat16 autocast, TF32 and bfloat16 substitutes for float32 products must not reach the logits; the settings come back."""
    hidden, weight, targets = head("spread", 64, 512, 512, torch.float32)
    h, w = leaves(hidden, weight)
    expected = linear_logprob(h, w, targets, backend="reference").logprob
    (expected_grad,) = torch.autograd.grad(expected.sum(), w)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = linear_logprob(h, w, targets, backend="reference").logprob
            assert result.dtype == torch.float32
            assert torch.equal(result, expected)
            assert torch.equal(torch.autograd.grad(result.sum(), w)[0], expected_grad)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_bfloat16_logits_are_not_rounded() -> None:
    """What most published paths do: logits rounded to bfloat16 are wrong by 0.1 nats at 40. Ours must beat that a thousandfold."""
    hidden, weight, targets = head("spread", 64, 64, 512, torch.bfloat16)
    exact = materialised_logprob(hidden.double(), weight.double(), targets).logprob
    rounded = torch.log_softmax((hidden @ weight.t()).float(), 1).gather(1, targets[:, None]).squeeze(1)
    ours = linear_logprob(hidden, weight, targets, backend="reference").logprob
    assert largest_error(rounded, exact) > 3e-2
    assert largest_error(ours, exact) < 3e-5


def test_tolerances_are_those_promised() -> None:
    assert GRADIENT_TOLERANCE[torch.float32] == 1e-5
    assert GRADIENT_TOLERANCE[torch.bfloat16] == 3e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [31, 4003])
def test_a_row_has_the_same_bits_among_few_others_and_among_many(vocab: int, dtype: torch.dtype) -> None:
    """What `invariant` sampling and learning rest on; the last chunk of a long call holds few rows too."""
    hidden, weight, targets = head("spread", 1040, 128, vocab, dtype)
    among_many = linear_logprob(hidden, weight, targets).logprob
    for rows in (1, 2, 3, 5, 6, 7, 9, 11, 15, 1024 + 1, 1024 + 5):
        assert torch.equal(linear_logprob(hidden[:rows], weight, targets[:rows]).logprob, among_many[:rows]), rows
        loss = {"segment_ids": torch.zeros(rows, dtype=torch.int64), "advantages": torch.ones(1), "weights": torch.ones(rows)}
        sampled = among_many[:rows]
        metrics = linear_policy_loss(hidden[:rows], weight, targets[:rows], old_logprobs=sampled, **loss, rule=LossRule()).metrics
        assert float(metrics["max_mismatch_abs"]) == 0, rows
