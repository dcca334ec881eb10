"""The head's kernels on CUDA: the checks that the interpreter and the reference pass, and what only a device can show."""

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    KINDS,
    RULES,
    check_logprob,
    check_phantom_mass,
    check_policy,
    head,
    largest_error,
    leaves,
    moved,
    policy_arguments,
    relative_error,
)

from bcr_kernels import LossRule, linear_logprob, linear_policy_loss, set_debug
from bcr_kernels.reference import materialised_logprob

DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("triton", "reference")


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [37, 1187, 50_257])
def test_logprob_against_float64(vocab: int, kind: str, dtype: torch.dtype, backend: str) -> None:
    check_logprob(*head(kind, 37, 64, vocab, dtype), 0.9, backend=backend, device="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [37, 1187, 50_257])
def test_policy_against_float64(vocab: int, kind: str, dtype: torch.dtype, backend: str) -> None:
    check_policy(*head(kind, 37, 64, vocab, dtype), RULES["clip"], 0.9, backend=backend, device="cuda")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule(rule: LossRule) -> None:
    check_policy(*head("peaked", 300, 128, 1187, torch.bfloat16), rule, 0.7, backend="triton", device="cuda")


@pytest.mark.parametrize("width", [1536, 1540])
def test_real_head(width: int) -> None:
    """V = 151,936; width 1540 has rows that TMA cannot read."""
    inputs = head("spread", 300, width, 151_936, torch.bfloat16)
    check_logprob(*inputs, backend="triton", device="cuda")
    check_policy(*inputs, RULES["clip"], backend="triton", device="cuda")
    check_phantom_mass(151_936, torch.bfloat16, backend="triton", device="cuda")


def prepared(tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    hidden, weight, targets = head("peaked", tokens, width, vocab, dtype)
    logprob = materialised_logprob(hidden.float(), weight.float(), targets).logprob.double()
    arguments = moved(policy_arguments(logprob, RULES["clip"]), "cuda", torch.float32)
    return hidden.cuda(), weight.cuda(), targets.cuda(), arguments


def count_active(targets: torch.Tensor, arguments: dict) -> int:
    ids = arguments["segment_ids"]
    return int(((ids >= 0) & (arguments["advantages"][ids] != 0) & (targets >= 0)).sum())


def test_no_hidden_wait_for_the_device(no_sync: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    hidden, weight, targets, arguments = prepared(300, 128, 1187)
    active = count_active(targets, arguments)
    h, w = leaves(hidden, weight)
    accumulator = torch.zeros(weight.shape, device="cuda")
    for guarded in (False, True):  # the first pass compiles
        torch.cuda.set_sync_debug_mode("error" if guarded else "default")
        out = linear_policy_loss(
            h, w, targets, **arguments, with_entropy=True, weight_grad_accumulator=accumulator, active_tokens=active, backend="triton"
        )
        (out.loss * 0.5).backward()
        result = linear_logprob(h, w, targets, with_entropy=True, active_tokens=300, backend="triton")
        (result.logprob.sum() + result.entropy.sum()).backward()
    torch.cuda.set_sync_debug_mode("default")
    assert all(bool(grad.isfinite().all() & grad.any()) for grad in (h.grad, w.grad, accumulator))  # it did do the work


def test_one_compilation_serves_every_batch() -> None:
    from bcr_kernels._triton import kernels

    hidden, weight, targets, arguments = prepared(300, 128, 1187)

    def run(tokens: int, temperature: float) -> None:
        part = arguments | {name: arguments[name][:tokens] for name in ("old_logprobs", "segment_ids", "weights")}
        h, w = leaves(hidden[:tokens], weight)
        rule = LossRule(clip_high=temperature / 10)
        linear_policy_loss(h, w, targets[:tokens], **(part | {"rule": rule}), temperature=temperature, backend="triton").loss.backward()
        linear_logprob(h, w, targets[:tokens], temperature=temperature, backend="triton").logprob.sum().backward()

    def compiled() -> int:
        every = (kernels.exponentials_kernel, kernels.rescue_kernel, kernels.logit_gradient_kernel, kernels.target_logit_kernel)
        return sum(len(cache[0]) for kernel in every for cache in kernel.device_caches.values())

    run(300, 1.0)
    before = compiled()
    for tokens, temperature in ((299, 0.7), (256, 1.3), (17, 1.0), (1, 0.5)):
        run(tokens, temperature)
    assert compiled() == before


def test_repeated_calls_are_bitwise_equal() -> None:
    hidden, weight, targets, arguments = prepared(4000, 256, 20_000)
    targets[:2000] = 7  # rows of the weight gradient that many tokens add to
    runs = []
    for _ in range(3):
        h, w = leaves(hidden, weight)
        out = linear_policy_loss(h, w, targets, **arguments, backend="triton")
        out.loss.backward()
        runs.append((out.loss, out.logprobs, h.grad, w.grad))
    for other in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], other, strict=True))


def test_logprobs_do_not_depend_on_the_batch() -> None:
    hidden, weight, targets, _ = prepared(700, 256, 20_000)
    whole = linear_logprob(hidden, weight, targets, with_entropy=True, backend="triton")
    order = torch.randperm(700, device="cuda")
    permuted = linear_logprob(hidden[order], weight, targets[order], with_entropy=True, backend="triton")
    few = linear_logprob(hidden[:5], weight, targets[:5], with_entropy=True, backend="triton")
    for part, other, third in zip(whole, permuted, few, strict=True):
        assert torch.equal(part[order], other)
        assert torch.equal(part[:5], third)


def test_offsets_beyond_31_bits() -> None:
    """T * V = 3.0e9 elements: 20,000 tokens over V = 151,936, in chunks and in one forward."""
    torch.manual_seed(0)
    hidden = torch.randn(20_000, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(151_936, 64, device="cuda", dtype=torch.bfloat16) / 8
    targets = torch.randint(0, 151_936, (20_000,), device="cuda")
    result = linear_logprob(hidden, weight, targets, backend="triton").logprob
    tail = linear_logprob(hidden[-50:], weight, targets[-50:], backend="reference").logprob
    assert largest_error(result[-50:], tail) < 1e-4


def test_memory_beyond_the_returned_gradients() -> None:
    """At most 1 GB at T = 8192, H = 1536, V = 151,936; the weight's gradient is counted as the float32 it is made in."""
    hidden = torch.randn(8192, 1536, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(151_936, 1536, device="cuda") / 40).bfloat16().requires_grad_()
    targets = torch.randint(0, 151_936, (8192,), device="cuda")
    per_token = {"old_logprobs": torch.full((8192,), -12.0, device="cuda"), "weights": torch.full((8192,), 1 / 8192, device="cuda")}
    arguments = per_token | {"segment_ids": torch.zeros(8192, dtype=torch.int64, device="cuda"), "advantages": torch.ones(1, device="cuda")}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_policy_loss(hidden, weight, targets, rule=LossRule(), **arguments, backend="triton").loss.backward()
    torch.cuda.synchronize()
    returned = hidden.grad.nbytes + weight.numel() * 4
    assert torch.cuda.max_memory_allocated() - before - returned < 1e9


def test_debug_mode_checks_values() -> None:
    hidden, weight, targets, _ = prepared(16, 64, 100)
    targets[3] = 100
    set_debug(True)
    try:
        with pytest.raises(ValueError, match=r"^targets: must be -100 or in \[0, 100\), got 100 at token 3"):
            linear_logprob(hidden, weight, targets)
    finally:
        set_debug(False)
    assert linear_logprob(hidden, weight, targets, backend="triton").logprob.isnan().nonzero().flatten().tolist() == [3]


def test_float32_never_uses_tf32() -> None:
    """With TF32 allowed globally, both backends stay at float32 precision."""
    hidden, weight, targets = head("peaked", 64, 512, 2000, torch.float32)
    exact = materialised_logprob(hidden.double(), weight.double(), targets).logprob
    torch.set_float32_matmul_precision("high")
    try:
        for backend in BACKENDS:
            result = linear_logprob(hidden.cuda(), weight.cuda(), targets.cuda(), backend=backend).logprob
            assert largest_error(result, exact) < 2e-5, backend
    finally:
        torch.set_float32_matmul_precision("highest")


def test_backends_agree_at_a_real_size() -> None:
    hidden, weight, targets, arguments = prepared(5000, 512, 30_000)
    gradients = []
    for backend in BACKENDS:
        h, w = leaves(hidden, weight)
        linear_policy_loss(h, w, targets, **arguments, backend=backend).loss.backward()
        gradients.append((h.grad, w.grad))
    for first, second in zip(*gradients, strict=True):
        assert relative_error(first, second) < 4e-3
