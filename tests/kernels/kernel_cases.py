"""Inputs that break head kernels, and the checks against float64 that every backend must pass on every device.

The reference of every check is the definition in float64, evaluated on the *rounded* inputs: what is measured is the error of the
arithmetic, not that of storing the inputs in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bcr_kernels import LossRule, linear_logprob, linear_policy_loss
from bcr_kernels.reference import materialised_logprob, materialised_policy_loss

KINDS = ("spread", "peaked", "duplicates", "negative", "confident")
LOGPROB_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-3}
RULES = {
    "clip": LossRule(clip_low=0.2, clip_high=0.28),
    "cispo": LossRule(kind="cispo", clip_low=1.0, clip_high=0.5),
    "importance": LossRule(importance_cap=1.1),
    "kl": LossRule(kl_coef=0.3),
    "all": LossRule(kind="cispo", importance_cap=1.05, kl_coef=0.1),
}


def head(kind: str, tokens: int, width: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden[T, H], weight[V, H], targets[T].

    spread: |logit| up to 80, targets anywhere, so that some are 100 nats below the maximum.
    peaked: every other row has one logit near 40. Targets are there. Logits elsewhere are of size 2.
    duplicates: pairs of vocabulary rows that differ in one bit share the mass.
    negative: every logit lies near -96, where exp underflows float32.
    confident: the target's logit leads by 8 to 15 nats, so that log-probs are -1e-3 to -1e-7.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64) / width**0.5
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    if kind == "spread":
        largest = (hidden @ weight.t()).abs().max() if tokens else 1.0
        hidden = hidden * (79.0 / largest)
    elif kind == "peaked":
        weight[targets[::2]] = hidden[::2] * (40 / hidden[::2].square().sum(1, keepdim=True))
    elif kind == "duplicates":
        half = vocab // 2
        weight[half : 2 * half] = weight[:half] * (1 + 2**-7)
        hidden = hidden * 5
    elif kind == "negative":
        hidden[:, 0], weight[:, 0] = 64.0, -1.5
    elif kind == "confident":
        lead = torch.linspace(8, 15, tokens, dtype=torch.float64)[:, None] + torch.tensor(float(vocab), dtype=torch.float64).log()
        unit = torch.eye(tokens, width, dtype=torch.float64)
        assert tokens <= min(width, vocab), "one direction per token"
        hidden, weight, targets = unit * lead, torch.zeros(vocab, width, dtype=torch.float64), torch.arange(tokens)
        weight[:tokens, :tokens] = torch.eye(tokens, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None, device: str | None = None) -> list[Tensor]:
    """Copies that require a gradient."""
    return [tensor.detach().clone().to(device=device, dtype=dtype or tensor.dtype).requires_grad_() for tensor in tensors]


def largest_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs()
    assert not difference.isnan().any()
    return float(difference.max()) if difference.numel() else 0.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected gradient."""
    norm = expected.double().norm().cpu()
    assert norm > 0, "a gradient that vanishes checks nothing"
    return float((actual.double().cpu() - expected.double().cpu()).norm() / norm)


def gradient_tolerance(hidden: Tensor, weight: Tensor) -> float:
    """A probability is as exact, relatively, as its logit is absolutely, and float32 rounds a logit of 80 by up to 4e-6."""
    largest = float((hidden.double() @ weight.double().t()).abs().max()) if hidden.numel() else 0.0
    rounding = 3 * largest * torch.finfo(torch.float32).eps if hidden.dtype == torch.float32 else 0.0
    return max(GRADIENT_TOLERANCE[hidden.dtype], rounding)


def check_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor = 1.0, *, backend: str, device: str = "cpu"
) -> dict[str, float]:
    """All three results and the gradient of a random combination of them. Returns the errors."""
    entropy = True
    h, w = leaves(hidden, weight, device=device)
    tau = temperature.to(device) if isinstance(temperature, Tensor) else temperature
    result = linear_logprob(h, w, targets.to(device), temperature=tau, with_entropy=entropy, backend=backend)  # type: ignore[arg-type]
    exact_h, exact_w = leaves(hidden, weight, dtype=torch.float64)
    exact_tau = temperature.double() if isinstance(temperature, Tensor) else temperature
    exact = materialised_logprob(exact_h, exact_w, targets, exact_tau)

    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(targets.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    torch.stack([(part.double() * g.to(device)).sum() for part, g in zip(result, upstream, strict=True)]).sum().backward()
    torch.stack([(part * g).sum() for part, g in zip(exact, upstream, strict=True)]).sum().backward()
    errors = {name: largest_error(part, expected) for name, part, expected in zip(result._fields, result, exact, strict=True)}
    errors |= {"hidden": relative_error(h.grad, exact_h.grad), "weight": relative_error(w.grad, exact_w.grad)}
    assert max(errors[name] for name in result._fields) <= LOGPROB_TOLERANCE, errors
    assert max(errors["hidden"], errors["weight"]) <= gradient_tolerance(hidden, weight), errors
    assert largest_error(result.logprob.clamp(min=0), torch.zeros(())) == 0, "a log-prob above 0"
    return errors


def check_phantom_mass(vocab: int, dtype: torch.dtype, *, backend: str, device: str = "cpu") -> None:
    """One logit of +3 among -15, in a vocabulary that fills no tile: padding columns with logit 0 would cost 0.8 nats."""
    weight = torch.full((vocab, 16), -15.0 / 16, dtype=dtype)
    weight[5] = 3.0 / 16
    hidden, targets = torch.ones(2, 16, dtype=dtype), torch.tensor([5, 0])
    exact = materialised_logprob(hidden.double(), weight.double(), targets)
    on_device = (tensor.to(device) for tensor in (hidden, weight, targets))
    result = linear_logprob(*on_device, with_entropy=True, backend=backend)  # type: ignore[arg-type]
    for part, expected in zip(result, exact, strict=True):
        assert largest_error(part, expected) < 1e-5


def policy_arguments(exact_logprob: Tensor, rule: LossRule, segments: int = 5, seed: int = 0) -> dict[str, Any]:
    """Arguments of the policy loss for a pack: log-probs near `exact_logprob`[T], segments laid at random, one with advantage 0."""
    tokens = exact_logprob.shape[0]
    generator = torch.Generator().manual_seed(seed)

    def noise(size: float) -> Tensor:
        return size * torch.randn(tokens, generator=generator, dtype=torch.float64)

    advantages = torch.randn(segments, generator=generator, dtype=torch.float64)
    advantages[0] = 0.0
    old = exact_logprob.detach() + noise(0.3)
    arguments: dict[str, Any] = {
        "old_logprobs": old,
        "segment_ids": torch.randint(-1, segments, (tokens,), generator=generator),
        "advantages": advantages,
        "weights": torch.rand(tokens, generator=generator, dtype=torch.float64) / max(tokens, 1),
        "rule": rule,
    }
    if rule.importance_cap is not None:
        arguments["behaviour_logprobs"] = old + noise(0.1)
    if rule.kl_coef > 0:
        arguments["reference_logprobs"] = old + noise(0.2)
    return arguments


def moved(arguments: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The vectors of a policy loss on a device, floating ones in `dtype`."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def check_policy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rule: LossRule,
    temperature: float = 1.0,
    *,
    backend: str,
    device: str = "cpu",
    scale: float = 1.0,
) -> dict[str, float]:
    """Loss, metrics, log-probs and gradients (at an upstream gradient of 1.7) against the [T, V] loss in float64, weights times `scale`."""
    exact_h, exact_w = leaves(hidden, weight, dtype=torch.float64)
    exact_logprob = materialised_logprob(exact_h, exact_w, targets, temperature).logprob.detach()
    vectors = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    arguments = policy_arguments(exact_logprob, rule)
    arguments["weights"] *= scale
    rounded = moved(moved(arguments, "cpu", vectors), "cpu", torch.float64)
    loss, metrics = materialised_policy_loss(exact_h, exact_w, targets, temperature=temperature, **rounded)
    (1.7 * loss).backward()

    h, w = leaves(hidden, weight, device=device)
    arguments = moved(arguments, device, vectors)
    out = linear_policy_loss(h, w, targets.to(device), temperature=temperature, backend=backend, **arguments)  # type: ignore[arg-type]
    (1.7 * out.loss).backward()

    segment, table = arguments["segment_ids"].cpu(), rounded["advantages"]
    active = (segment >= 0) & (targets != -100) & (table[segment] != 0 if rule.kl_coef == 0 else True)
    errors = {
        "logprob": largest_error(out.logprobs.cpu()[active], exact_logprob[active]),
        "loss": largest_error(out.loss, loss) / max(scale, float(loss.detach().abs())),
        "hidden": relative_error(h.grad, exact_h.grad),
        "weight": relative_error(w.grad, exact_w.grad),
    }
    assert int(active.sum()) == int(metrics["tokens"]) > 0
    assert out.logprobs.cpu()[~active].eq(0).all()
    assert errors["logprob"] <= LOGPROB_TOLERANCE, errors
    assert errors["loss"] <= LOGPROB_TOLERANCE, errors
    assert max(errors["hidden"], errors["weight"]) <= gradient_tolerance(hidden, weight), errors
    assert out.metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        assert abs(float(out.metrics[name]) - float(value)) <= 1e-3 * max(1.0, abs(float(value))), name
    return errors
