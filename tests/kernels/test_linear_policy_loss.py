"""`linear_policy_loss` on the reference backend: equal to the [T, V] loss, invariant to packing, and frugal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, RULES, check_policy, head, largest_error, leaves, policy_arguments, relative_error

import bcr_kernels as K
from bcr_kernels import LossRule, linear_logprob, linear_policy_loss, policy_loss, reference
from bcr_kernels.reference import materialised_logprob, materialised_policy_loss

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [37, 1187])
def test_against_float64(kind: str, vocab: int, dtype: torch.dtype) -> None:
    check_policy(*head(kind, 21, 48, vocab, dtype), RULES["clip"], backend="reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule(rule: LossRule, dtype: torch.dtype) -> None:
    check_policy(*head("peaked", 30, 32, 101, dtype), rule, 0.7, backend="reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [50_257, 151_936])
def test_real_vocabularies(vocab: int, dtype: torch.dtype) -> None:
    check_policy(*head("spread", 6, 32, vocab, dtype), RULES["all"], backend="reference")


def test_by_hand() -> None:
    """Two tokens over a vocabulary of two; p = softmax([0, 0]) and softmax([log 3, 0]). On policy, so dloss/dlogprob = -weight * A.

    dloss/dlogits = -w A ([v = y] - p): for token 0 with y = 0, A = 2, w = 0.5: -1 * (0.5, -0.5); for token 1 with y = 1, A = -1,
    w = 0.25: 0.25 * (-0.75, 0.75). Token 2 belongs to no segment.
    """
    hidden = torch.tensor([[0.0, 1.0], [1.0, 0.0], [5.0, 5.0]], dtype=torch.float64).requires_grad_()
    weight = torch.tensor([[torch.tensor(3.0).log().item(), 0.0], [0.0, 0.0]], dtype=torch.float64).requires_grad_()
    targets = torch.tensor([0, 1, 0])
    old = torch.tensor([0.5, 0.25, 0.1], dtype=torch.float64).log()
    out = linear_policy_loss(
        hidden,
        weight,
        targets,
        old_logprobs=old,
        segment_ids=torch.tensor([1, 0, -1]),
        advantages=torch.tensor([-1.0, 2.0]),
        weights=torch.tensor([0.5, 0.25, 1.0]),
        rule=LossRule(),
        with_entropy=True,
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-0.5 * 2 + 0.25, abs=1e-6)
    assert torch.allclose(out.logprobs[:2], old[:2], atol=1e-6)
    assert out.logprobs[2] == 0
    dlogits = torch.tensor([[-0.5, 0.5], [-0.1875, 0.1875], [0, 0]], dtype=torch.float64)
    assert torch.allclose(weight.grad, dlogits.t() @ hidden.detach(), atol=1e-6)
    assert torch.allclose(hidden.grad, dlogits @ weight.detach(), atol=1e-6)
    entropy = 0.693147 + (0.75 * 0.287682 + 0.25 * 1.386294)
    assert out.metrics["entropy_sum"].item() == pytest.approx(entropy, abs=1e-5)


@st.composite
def packs(draw: st.DrawFn) -> dict:
    """A pack of random segments with random, often zero, advantages and weights."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=0, max_size=6))
    ids: list[int] = []
    for index, (gap, length) in enumerate(lengths):
        ids += [-1] * gap + [index] * length
    number = st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.3, -2.5])
    advantages = [draw(number) for _ in lengths]
    weights = [draw(st.sampled_from([0.0, 0.25, 1.0])) for _ in ids]
    return {
        "ids": ids,
        "advantages": advantages,
        "weights": weights,
        "rule": draw(st.sampled_from(sorted(RULES))),
        "seed": draw(st.integers(0, 99)),
    }


@given(pack=packs())
@settings(max_examples=100, deadline=None)
def test_gradients_equal_the_naive_loss_for_any_segmentation(pack: dict) -> None:
    tokens, rule = len(pack["ids"]), RULES[pack["rule"]]
    generator = torch.Generator().manual_seed(pack["seed"])
    hidden, weight = (torch.randn(rows, 8, generator=generator, dtype=torch.float64) for rows in (tokens, 11))
    targets = torch.randint(0, 11, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.1] = -100
    arguments = policy_arguments(materialised_logprob(hidden, weight, targets).logprob, rule)
    arguments |= {
        "segment_ids": torch.tensor(pack["ids"], dtype=torch.int64),
        "advantages": torch.tensor(pack["advantages"], dtype=torch.float64),
        "weights": torch.tensor(pack["weights"], dtype=torch.float64),
    }
    h, w = leaves(hidden, weight)
    exact_h, exact_w = leaves(hidden, weight)
    out = linear_policy_loss(h, w, targets, **arguments)
    loss, metrics = materialised_policy_loss(exact_h, exact_w, targets, **arguments)
    out.loss.backward()
    loss.backward()
    assert largest_error(out.loss, loss) < 1e-10
    assert largest_error(h.grad, exact_h.grad) < 1e-10
    assert largest_error(w.grad, exact_w.grad) < 1e-10
    assert {name: float(value) for name, value in out.metrics.items()} == pytest.approx(
        {name: float(value) for name, value in metrics.items()}, abs=1e-9
    )


def prepared(tokens: int = 40, dtype: torch.dtype = torch.float64, rule: LossRule = RULES["clip"]) -> tuple:
    hidden, weight, targets = head("peaked", tokens, 16, 53, dtype)
    arguments = policy_arguments(materialised_logprob(hidden.double(), weight.double(), targets).logprob, rule)
    return hidden, weight, targets, arguments


PER_TOKEN = ("old_logprobs", "segment_ids", "weights")


def test_packing_order_and_splits_do_not_change_the_gradient() -> None:
    """The same sequences in one pack, in two, and in another order: denominators are the step's, so gradients agree to 1e-10."""
    hidden, weight, targets, arguments = prepared()
    arguments["segment_ids"] = torch.arange(40) // 10
    arguments["weights"] = K.problem_mean_weights(arguments["segment_ids"], 4, 4, torch.float64)
    gradients = []
    for split in ([range(40)], [range(10), range(10, 40)], [range(30, 40), range(30)], [[*range(20, 40), *range(20)]]):
        (w,) = leaves(weight)
        for tokens in split:
            index = torch.tensor(tokens)
            part = arguments | {name: arguments[name][index] for name in PER_TOKEN}
            linear_policy_loss(hidden[index], w, targets[index], **part).loss.backward()
        gradients.append(w.grad)
    assert all(largest_error(gradient, gradients[0]) < 1e-10 for gradient in gradients[1:])


def test_the_fused_loss_is_that_of_the_two_step_path() -> None:
    """`linear_logprob` followed by `policy_loss`: what a loss that does not fit the fused form would do."""
    hidden, weight, targets, arguments = prepared(rule=RULES["kl"])
    h, w = leaves(hidden, weight)
    out = linear_policy_loss(h, w, targets, **arguments)
    out.loss.backward()
    h2, w2 = leaves(hidden, weight)
    ids, table = arguments["segment_ids"], arguments["advantages"]
    logprob = linear_logprob(h2, w2, targets).logprob
    loss, metrics = policy_loss(
        logprob,
        arguments["old_logprobs"],
        torch.where(ids >= 0, table[ids], 0.0),
        torch.where(ids >= 0, arguments["weights"], 0.0),
        arguments["rule"],
        reference_logprobs=arguments["reference_logprobs"],
    )
    loss.sum().backward()
    assert relative_error(h.grad, h2.grad) < 1e-12
    assert relative_error(w.grad, w2.grad) < 1e-12
    assert out.metrics.keys() == metrics.keys()


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_does_not_grow_with_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = head("peaked", 64, 32, 512, dtype)
    errors = []
    for rows in (64, 1):
        monkeypatch.setattr(reference, "POLICY_ELEMENTS", rows * 512)
        errors.append(check_policy(hidden, weight, targets, RULES["clip"], backend="reference"))
    for name in errors[0]:
        assert errors[1][name] <= 1.5 * errors[0][name] + 2e-6, name


def test_repeated_calls_are_bitwise_equal() -> None:
    hidden, weight, targets, arguments = prepared(dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        h, w = leaves(hidden, weight)
        out = linear_policy_loss(h, w, targets, **arguments)
        out.loss.backward()
        runs.append((out.loss, out.logprobs, h.grad, w.grad))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_inactive_tokens_never_enter_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """No segment, advantage 0, weight 0, target -100: of 30 tokens 20 are left; with a KL term the one of advantage 0 stays too."""
    hidden, weight, targets, arguments = prepared(30)
    arguments |= {"segment_ids": torch.tensor([-1] * 6 + [0] + [1] * 23), "advantages": torch.tensor([0.0, 2.0]), "weights": torch.ones(30)}
    left = [7, *range(11, 30)]
    arguments["old_logprobs"] = materialised_logprob(hidden, weight, targets).logprob  # on policy: nothing is clipped
    arguments["weights"][8:10], targets[10] = 0, -100
    hidden[:6] = float("nan")
    rows = []
    original = reference.matmul
    monkeypatch.setattr(reference, "matmul", lambda a, b: rows.append(a.shape[0]) or original(a, b))
    h, w = leaves(hidden, weight)
    out = linear_policy_loss(h, w, targets, **arguments)
    out.loss.backward()
    assert rows == [20]
    assert out.metrics["tokens"] == 20
    assert h.grad.abs().sum(1).nonzero().flatten().tolist() == left
    assert h.grad.isfinite().all()
    assert w.grad.isfinite().all()
    assert out.logprobs.nonzero().flatten().tolist() == left

    rows.clear()
    out = linear_policy_loss(
        h, w, targets, **(arguments | {"rule": LossRule(kl_coef=0.1)}), reference_logprobs=arguments["old_logprobs"] - 0.1
    )
    assert rows == [21]
    assert linear_policy_loss(h, w, targets, **arguments, active_tokens=20).loss == linear_policy_loss(h, w, targets, **arguments).loss


@pytest.mark.parametrize("how", ["none at all", "all masked", "no segment", "zero advantages"])
def test_a_pack_without_work_still_has_gradients(how: str) -> None:
    """Every rank runs the same number of packs: an empty one gives loss 0, gradients 0 and the same metrics."""
    hidden, weight, targets, arguments = prepared(8, rule=RULES["importance"])
    if how == "none at all":
        hidden, targets = hidden[:0], targets[:0]
        arguments |= {name: arguments[name][:0] for name in (*PER_TOKEN, "behaviour_logprobs")}
    elif how == "all masked":
        targets = torch.full_like(targets, -100)
    elif how == "no segment":
        arguments |= {"segment_ids": torch.full((8,), -1), "advantages": torch.zeros(0)}
    else:
        arguments["advantages"] = torch.zeros(5)
    h, w = leaves(hidden, weight)
    out = linear_policy_loss(h, w, targets, **arguments, with_entropy=True)
    out.loss.backward()
    assert out.loss == 0
    assert h.grad.shape == hidden.shape
    assert h.grad.eq(0).all()
    assert w.grad.eq(0).all()
    full = prepared(8, rule=RULES["importance"])
    assert out.metrics.keys() == linear_policy_loss(*full[:3], **full[3], with_entropy=True).metrics.keys()
    assert all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0])
def test_the_upstream_gradient_is_respected(factor: float) -> None:
    hidden, weight, targets, arguments = prepared()
    h, w = leaves(hidden, weight)
    (exact_h, exact_w) = leaves(hidden, weight)
    (factor * linear_policy_loss(h, w, targets, **arguments).loss + (w * 0.1).sum()).backward()
    (factor * materialised_policy_loss(exact_h, exact_w, targets, **arguments)[0] + (exact_w * 0.1).sum()).backward()
    assert largest_error(h.grad, exact_h.grad) < 1e-12
    assert largest_error(w.grad, exact_w.grad) < 1e-12


def test_weight_gradients_accumulate_in_float32_over_packs() -> None:
    """64 packs: gradients added in bfloat16 drift, the accumulator does not; it takes the upstream factor and leaves weight.grad."""
    hidden, weight, targets, arguments = prepared(64, torch.bfloat16)
    exact_h, exact_w = leaves(hidden, weight, dtype=torch.float64)
    materialised_policy_loss(exact_h, exact_w, targets, **arguments)[0].backward()
    accumulator, (rounded, w) = torch.zeros(weight.shape), leaves(weight, weight)
    for token in range(64):
        one = slice(token, token + 1)
        part = arguments | {name: arguments[name][one] for name in PER_TOKEN}
        linear_policy_loss(hidden[one], rounded, targets[one], **part).loss.backward()
        out = linear_policy_loss(hidden[one], w, targets[one], **part, weight_grad_accumulator=accumulator)
        (2.0 * out.loss).backward()
    assert w.grad is None
    assert relative_error(accumulator / 2, exact_w.grad) < 1e-5
    assert relative_error(rounded.grad, exact_w.grad) > 2e-3


def test_a_second_backward_is_refused() -> None:
    hidden, weight, targets, arguments = prepared()
    (w,) = leaves(weight)
    loss = linear_policy_loss(hidden, w, targets, **arguments).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out by an earlier backward"):
        loss.backward()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_what_needs_no_gradient_costs_none(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    original = reference.matmul_add_
    monkeypatch.setattr(reference, "matmul_add_", lambda total, a, b: products.append(total.shape[1]) or original(total, a, b))
    hidden, weight, targets, arguments = prepared()
    h, w = leaves(hidden, weight)
    expected = linear_policy_loss(h, w, targets, **arguments)
    products.clear()
    h.requires_grad_(frozen in ("weight", "no_grad"))
    w.requires_grad_(frozen in ("hidden", "no_grad"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        out = linear_policy_loss(h, w, targets, **arguments)
    assert len(products) == (0 if frozen in ("both", "no_grad") else 1)
    assert out.loss.requires_grad == (frozen in ("hidden", "weight"))
    assert largest_error(out.loss, expected.loss) < 1e-12
    if out.loss.requires_grad:
        out.loss.backward()
        assert (h.grad is None) == (frozen == "hidden")
        assert (w.grad is None) == (frozen == "weight")


def test_tied_weight_receives_both_gradients() -> None:
    """Embedding and head in one tensor, the head through a transposed view."""
    stored = torch.randn(16, 53, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, _, targets, arguments = prepared()
    inputs = targets.roll(1)
    gradients = []
    for function in (lambda *a: linear_policy_loss(*a, **arguments).loss, lambda *a: materialised_policy_loss(*a, **arguments)[0]):
        (table,) = leaves(stored)
        function(torch.nn.functional.embedding(inputs, table.t()), table.t(), targets).backward()
        gradients.append(table.grad)
    assert relative_error(*gradients) < 1e-12


def test_targets_and_segments_may_be_int32() -> None:
    hidden, weight, targets, arguments = prepared()
    expected = linear_policy_loss(hidden, weight, targets, **arguments).loss
    arguments["segment_ids"] = arguments["segment_ids"].int()
    assert linear_policy_loss(hidden, weight, targets.int(), **arguments).loss == expected
