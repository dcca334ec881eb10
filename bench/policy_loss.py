"""The head and the policy loss, forward and backward: ours beside its peers. `python -m bench.policy_loss [--help]`.

One case is T, H, V and the share of tokens that carry no gradient (no segment, or a group whose advantage is 0). Four sequences lie in
the pack, with two segments each. The limit counts the three products of the *active* tokens, 6 * active * H * V: only a path that leaves
the others out can come near it.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bcr_kernels import LossRule, linear_logprob, linear_policy_loss, policy_loss, token_mean_weights
from bench._protocol import Contender, default_device, matmul_peak, measure, print_header, print_json, print_rows
from bench.linear_logprob import chosen_cases, error_of, inputs, materialised, parse

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets -> 0-d loss
IDLE_SHARES = (0.0, 0.5, 0.9)
SEQUENCES, SEGMENTS = 4, 8
RULE = LossRule(clip_low=0.2, clip_high=0.28)


class Pack:
    """The vectors of a pack of T tokens; the first `idle` share of each segment belongs to no segment."""

    def __init__(self, tokens: int, idle: float, device: str) -> None:
        position = torch.arange(tokens, device=device)
        length = -(-tokens // SEGMENTS)
        inside = (position % length) >= round(idle * length)
        self.segment_ids = torch.where(inside, position // length, -1)
        self.active = int(inside.sum())
        self.advantages = torch.linspace(-1, 1, SEGMENTS, device=device)
        self.weights = token_mean_weights(self.segment_ids, self.active)
        self.old = torch.empty(tokens, device=device)

    def token_advantages(self) -> Tensor:
        return torch.where(self.segment_ids >= 0, self.advantages[self.segment_ids], 0.0)


def losses(pack: Pack, device: str, compile_peer: bool) -> tuple[dict[str, Loss], dict[str, str]]:
    """What runs here, and why the others do not."""
    vectors = {"old_logprobs": pack.old, "segment_ids": pack.segment_ids, "advantages": pack.advantages, "weights": pack.weights}

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_policy_loss(hidden, weight, targets, **vectors, rule=RULE, active_tokens=pack.active).loss

    def two_steps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logprob = linear_logprob(hidden, weight, targets, active_tokens=targets.shape[0]).logprob
        return policy_loss(logprob, pack.old, pack.token_advantages(), pack.weights, RULE)[0].sum()

    def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logprob = materialised(hidden, weight, targets)
        return policy_loss(logprob, pack.old, pack.token_advantages(), pack.weights, RULE)[0].sum()

    def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """One advantage per sequence is all it takes, and rows of one length: four sequences, token mean."""
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        grpo = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=device == "cuda", epsilon_high=0.28, loss_type="bnpo")
        rows = hidden.view(SEQUENCES, -1, hidden.shape[1])
        mask = (pack.segment_ids >= 0).view(SEQUENCES, -1).float()
        old = pack.old.view(SEQUENCES, -1)
        return grpo(rows, weight, targets.view(SEQUENCES, -1), mask, pack.advantages[::2], old_per_token_logps=old)[0]

    run: dict[str, Loss] = {"ours": ours, "ours, linear_logprob + rule": two_steps, "materialised": naive}
    left_out = {}
    if compile_peer:
        run["materialised, torch.compile"] = torch.compile(naive, dynamic=False)
    else:
        left_out["materialised, torch.compile"] = "asked for with --compile"
    if importlib.util.find_spec("liger_kernel") is None:
        left_out["liger GRPO loss"] = "liger_kernel is not installed"
    else:
        run["liger GRPO loss"] = liger
    return run, left_out


def ours_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The log-probs that `linear_policy_loss` reports, of all tokens."""
    tokens = targets.shape[0]
    ones, ids = torch.ones(tokens, device=hidden.device), torch.zeros(tokens, dtype=torch.int64, device=hidden.device)
    return linear_policy_loss(
        hidden,
        weight,
        targets,
        old_logprobs=-12 * ones,
        segment_ids=ids,
        advantages=ones[:1],
        weights=ones,
        rule=RULE,
        active_tokens=tokens,
    ).logprobs


def run_case(
    case: tuple[int, int, int], idle: float, arguments: argparse.Namespace, device: str, dtype: torch.dtype, peak: float
) -> dict[str, Any]:
    tokens, width, vocab = case
    pack = Pack(tokens, idle, device)
    hidden, weight, targets = inputs(*case, dtype, device)
    pack.old.copy_(linear_logprob(hidden, weight, targets, active_tokens=tokens).logprob - 0.05)
    errors = {"ours": error_of(ours_logprob, hidden, weight, targets), "materialised": error_of(materialised, hidden, weight, targets)}
    hidden.requires_grad_()
    weight.requires_grad_()
    flop = 6 * pack.active * width * vocab
    print_header(f"T = {tokens}, H = {width}, V = {vocab}, {idle:.0%} without gradient: limit {1e3 * flop / peak:.2f} ms")
    contenders: list[Contender] = []
    for name, loss in losses(pack, device, arguments.compile)[0].items():

        def both(loss: Loss = loss) -> None:
            loss(hidden, weight, targets).backward()

        contenders.append(Contender(name, "forward+backward", both, [hidden, weight], flop, errors.get(name)))
    results = measure(contenders, peak=peak, device=device, repeats=arguments.repeats)
    print_rows(results)
    return {"tokens": tokens, "width": width, "vocab": vocab, "idle": idle, "results": results}


def main() -> None:
    arguments, device = parse(__doc__), default_device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peak = matmul_peak(device, dtype)
    print(f"{device}, {dtype}: matmul peak {peak / 1e12:.3f} TFLOP/s")
    cases = [run_case(case, idle, arguments, device, dtype, peak) for case in chosen_cases(arguments, device) for idle in IDLE_SHARES]
    for name, reason in losses(Pack(SEGMENTS, 0.0, device), device, arguments.compile)[1].items():
        print(f"left out: {name}: {reason}")
    print_json("policy_loss", device, dtype, peak, cases)


if __name__ == "__main__":
    main()
