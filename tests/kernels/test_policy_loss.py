"""The loss rule on [T] vectors: cases computed by hand, its derivative, and what the metrics count."""

import math

import pytest
import torch
from torch import Tensor

from bcr_kernels import LossRule, add_metrics, policy_loss

OLD = math.log(0.5)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_token(rule: LossRule, probability: float, advantage: float, weight: float = 1.0, **others: float) -> tuple[float, float]:
    """Loss and dloss/dlogprob of a token whose old probability is 0.5."""
    logprob = vector(math.log(probability)).requires_grad_()
    extra = {f"{name}_logprobs": vector(math.log(value)) for name, value in others.items()}
    loss, _ = policy_loss(logprob, vector(OLD), vector(advantage), vector(weight), rule, **extra)
    loss.sum().backward()
    return float(loss.detach()), float(logprob.grad)


@pytest.mark.parametrize(
    ("probability", "advantage", "loss", "slope"),
    [
        (0.5, 1.0, -1.0, -1.0),  # on policy: r = 1
        (0.55, 1.0, -1.1, -1.1),  # inside the bounds
        (0.75, 1.0, -1.28, 0.0),  # r = 1.5 above 1.28: clipped
        (0.75, -1.0, 1.5, 1.5),  # the bad token grew: never clipped
        (0.25, -1.0, 0.8, 0.0),  # r = 0.5 below 0.8: clipped
        (0.25, 1.0, -0.5, -0.5),  # the good token shrank: never clipped
        (0.625, 2.0, -2.5, -2.5),  # r = 1.25: the higher bound is the wider one
        (0.75, 0.0, 0.0, 0.0),
    ],
)
def test_clip_by_hand(probability: float, advantage: float, loss: float, slope: float) -> None:
    rule = LossRule(clip_low=0.2, clip_high=0.28)
    assert one_token(rule, probability, advantage) == pytest.approx((loss, slope))
    assert one_token(rule, probability, advantage, weight=0.25) == pytest.approx((loss / 4, slope / 4))


@pytest.mark.parametrize(("probability", "factor"), [(0.5, 1.0), (0.6, 1.2), (0.75, 1.28), (0.25, 0.8), (0.45, 0.9)])
def test_cispo_by_hand(probability: float, factor: float) -> None:
    """The factor is a constant: the slope is -A * factor whatever the clipping does."""
    rule = LossRule(kind="cispo", clip_low=0.2, clip_high=0.28)
    for advantage in (1.5, -0.5):
        expected = (-advantage * factor * math.log(probability), -advantage * factor)
        assert one_token(rule, probability, advantage) == pytest.approx(expected)


def test_cispo_without_bounds() -> None:
    rule = LossRule(kind="cispo", clip_low=1.0, clip_high=math.inf)
    assert one_token(rule, 0.05, 1.0)[1] == pytest.approx(-0.1)
    assert one_token(rule, 1.0, 1.0)[1] == pytest.approx(-2.0)


@pytest.mark.parametrize(("behaviour", "importance"), [(0.5, 1.0), (0.4, 1.25), (0.1, 2.0), (0.8, 0.625)])
def test_truncated_importance_by_hand(behaviour: float, importance: float) -> None:
    """min(old / behaviour, 2) multiplies loss and slope, and does not depend on the trained policy."""
    loss, slope = one_token(LossRule(importance_cap=2.0), 0.55, 1.0, behaviour=behaviour)
    assert (loss, slope) == pytest.approx((-1.1 * importance, -1.1 * importance))


def test_kl_by_hand() -> None:
    """kl_coef * (ref/p - log(ref/p) - 1), slope kl_coef * (1 - ref/p); neither the advantage nor the importance weight touches it."""
    kl = 2 - math.log(2) - 1
    rule = LossRule(kl_coef=0.1)
    assert one_token(rule, 0.25, 0.0, reference=0.5) == pytest.approx((0.1 * kl, 0.1 * (1 - 2)))
    assert one_token(rule, 0.25, 1.0, weight=3.0, reference=0.5) == pytest.approx((3 * (-0.5 + 0.1 * kl), 3 * (-0.5 - 0.1)))
    rule = LossRule(kl_coef=0.1, importance_cap=1.5)
    assert one_token(rule, 0.25, 1.0, reference=0.5, behaviour=0.4)[0] == pytest.approx(-0.5 * 1.25 + 0.1 * kl)


def test_slope_is_the_derivative() -> None:
    """Central differences, away from the bounds."""
    for rule in (LossRule(), LossRule(kl_coef=0.2), LossRule(importance_cap=1.2)):
        others = {"reference": 0.3} if rule.kl_coef else {}
        others |= {"behaviour": 0.45} if rule.importance_cap else {}
        for probability in (0.05, 0.45, 0.55, 0.9):
            step = 1e-6
            up, _ = one_token(rule, probability * math.exp(step), -0.7, **others)
            down, _ = one_token(rule, probability * math.exp(-step), -0.7, **others)
            assert one_token(rule, probability, -0.7, **others)[1] == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-9)


def test_metrics_by_hand() -> None:
    """Tokens: inside, clipped above, clipped below, and one that is inactive though its ratio is extreme."""
    logprobs = torch.log(vector(0.5, 0.75, 0.25, 1e-9))
    arguments = (logprobs, torch.full_like(logprobs, OLD), vector(1, 1, -1, 0), vector(0.5, 0.5, 0.5, 0.5))
    loss, metrics = policy_loss(*arguments, LossRule())
    assert loss.tolist() == pytest.approx([-0.5, -0.6, 0.4, 0.0])
    expected = {
        "tokens": 3,
        "loss_sum": -0.7,
        "ratio_sum": 1 + 1.5 + 0.5,
        "clipped_high": 1,
        "clipped_low": 1,
        "policy_kl_sum": (0.5 - math.log(1.5)) + (-0.5 - math.log(0.5)),
        "mismatch_abs_sum": math.log(1.5) + math.log(2),
        "max_mismatch_abs": math.log(2),
        "mismatch_kl_sum": (0.5 - math.log(1.5)) + (-0.5 - math.log(0.5)),
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected)
    assert all(value.dtype == torch.float64 and value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_mismatch_is_that_of_trainer_and_sampler() -> None:
    """With the sampler's log-probs given, mismatch compares them with old_logprobs, not with the moving policy."""
    logprobs, old, behaviour = torch.log(vector(0.9, 0.3)), torch.log(vector(0.5, 0.5)), torch.log(vector(0.4, 0.5))
    rule = LossRule(importance_cap=1.1)
    _, metrics = policy_loss(logprobs, old, vector(1, 1), vector(1, 1), rule, behaviour_logprobs=behaviour)
    assert float(metrics["mismatch_abs_sum"]) == pytest.approx(math.log(1.25))
    assert float(metrics["mismatch_kl_sum"]) == pytest.approx(0.25 - math.log(1.25))
    assert float(metrics["importance_capped"]) == 1
    assert float(metrics["importance_sum"]) == pytest.approx(1.1 + 1.0)


def test_metrics_add_up_over_packs() -> None:
    """Sums over two packs are those of one pack with both; the maximum is the maximum."""
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages, weights, reference = (torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(5))
    rule = LossRule(kl_coef=0.1)

    def part(span: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss(logprobs[span], old[span], advantages[span], weights[span], rule, reference_logprobs=reference[span])

    whole = part(slice(0, 12))[1]
    total = {}
    for span in (slice(0, 5), slice(5, 5), slice(5, 12)):
        total = add_metrics(total, part(span)[1])
    assert {name: float(value) for name, value in total.items()} == pytest.approx({name: float(value) for name, value in whole.items()})
    with pytest.raises(ValueError, match=r"^more:"):
        add_metrics(total, {"tokens": torch.zeros(())})


def test_inactive_tokens_may_hold_anything() -> None:
    bad = vector(float("nan"), float("inf"), -float("inf"), -1.0)
    logprobs = bad.clone().requires_grad_()
    reference = vector(0, 0, 0, -1.5)
    rule = LossRule(importance_cap=2.0, kl_coef=0.1)
    loss, metrics = policy_loss(
        logprobs, bad, vector(1, 1, 1, 1), vector(0, 0, 0, 1), rule, behaviour_logprobs=bad, reference_logprobs=reference
    )
    loss.sum().backward()
    assert loss[:3].tolist() == [0, 0, 0]
    assert logprobs.grad[:3].tolist() == [0, 0, 0]
    assert logprobs.grad[3] != 0
    assert all(torch.isfinite(value) for value in metrics.values())


def test_a_clipped_ratio_that_overflows_has_no_gradient() -> None:
    """exp(200) overflows float32; a clipped token's gradient is 0, not 0 * inf."""
    logprobs = torch.tensor([0.0], requires_grad=True)
    loss, _ = policy_loss(logprobs, torch.tensor([-200.0]), torch.ones(1), torch.ones(1), LossRule())
    loss.sum().backward()
    assert loss.item() == pytest.approx(-1.2)
    assert logprobs.grad.item() == 0


def test_precision_follows_the_logprobs() -> None:
    for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        ones = torch.ones(2)
        loss, _ = policy_loss(torch.zeros(2, dtype=dtype), ones, ones, ones, LossRule())
        assert loss.dtype == expected


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("kind", {"kind": "ppo"}),
        ("clip_low", {"clip_low": -0.1}),
        ("clip_low", {"clip_low": 1.1}),
        ("clip_high", {"clip_high": -0.1}),
        ("clip_high", {"clip_high": math.nan}),
        ("importance_cap", {"importance_cap": 0.0}),
        ("importance_cap", {"importance_cap": math.inf}),
        ("kl_coef", {"kl_coef": -1.0}),
        ("kl_coef", {"kl_coef": math.nan}),
    ],
)
def test_a_bad_rule_is_refused(name: str, values: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{name}:"):
        LossRule(**values)


@pytest.mark.parametrize(
    ("name", "rule", "change"),
    [
        ("old_logprobs", LossRule(), {"old_logprobs": torch.zeros(4)}),
        ("advantages", LossRule(), {"advantages": torch.zeros(3, dtype=torch.int64)}),
        ("weights", LossRule(), {"weights": torch.zeros(1, 3)}),
        ("behaviour_logprobs", LossRule(importance_cap=2.0), {}),
        ("reference_logprobs", LossRule(kl_coef=0.1), {}),
        ("reference_logprobs", LossRule(), {"reference_logprobs": torch.zeros(3)}),
        ("rule", "clip", {}),
    ],
)
def test_bad_vectors_are_refused(name: str, rule: LossRule, change: dict) -> None:
    arguments = {"logprobs": torch.zeros(3), "old_logprobs": torch.zeros(3), "advantages": torch.zeros(3), "weights": torch.zeros(3)}
    with pytest.raises(ValueError, match=rf"^{name}:"):
        policy_loss(**(arguments | change), rule=rule)
