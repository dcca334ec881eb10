"""Log-prob per token from hidden states: ours beside its peers. `python -m bench.linear_logprob [--help]`.

One case is a triple T, H, V. "forward" has no gradient (old and reference log-probs); "forward+backward" gives those of hidden and
weight for an upstream gradient per token. The limit is 2THV multiply-adds forward and 6THV in all; a path that recomputes its logits
needs 8THV. Peers that are not installed, or do not run here, are named at the end with the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcr_kernels import linear_logprob
from bcr_kernels.reference import materialised_logprob
from bench._protocol import Contender, default_device, matmul_peak, measure, print_header, print_json, print_rows

Path = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden[T, H], weight[V, H], targets[T] -> log-prob[T]
CUDA_CASES = [(tokens, *head) for tokens in (2048, 8192, 32_768) for head in ((1536, 151_936), (2560, 151_936), (4096, 128_256))]
CPU_CASES = [(512, 256, 16_384)]
ERROR_ROWS = 256


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What most trainers do: logits in the dtype of the model, log-softmax in float32."""
    return F.log_softmax(F.linear(hidden, weight).float(), -1).gather(1, targets[:, None]).squeeze(1)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets, active_tokens=targets.shape[0]).logprob


def ours_with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, targets, with_entropy=True, active_tokens=targets.shape[0]).logprob


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8192, None, 1.0, ())[0]


def liger_scaled(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Its Hopper kernel where there is one, its chunked torch path elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    out = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
    return -(out[0] if isinstance(out, tuple) else out)


def torch_fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """A sum over tokens and no log-prob of any: the training loss of supervised learning, here as the nearest that torch has."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def liger_fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """A sum over tokens, like `torch_fused`; its kernels are Triton, so CUDA alone."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


def paths(device: str, compile_peer: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """What runs here, and why the others do not."""
    run: dict[str, Path] = {"ours": ours, "ours, with entropy": ours_with_entropy, "materialised": materialised}
    left_out = {}
    if compile_peer:
        run["materialised, torch.compile"] = torch.compile(materialised, dynamic=False)
    else:
        left_out["materialised, torch.compile"] = "asked for with --compile"
    wanted: list[tuple[str, Path, str, str]] = [
        ("trl chunked", trl_chunked, "trl accelerate", "any"),
        ("liger scaled cross entropy", liger_scaled, "liger_kernel", "any"),
        ("liger cross entropy (sum)", liger_fused, "liger_kernel", "cuda"),
    ]
    for name, path, packages, where in wanted:
        missing = [package for package in packages.split() if importlib.util.find_spec(package) is None]
        if missing:
            left_out[name] = f"{' and '.join(missing)} not installed"
        elif where == "cuda" and device != "cuda":
            left_out[name] = "runs on CUDA alone"
        else:
            run[name] = path
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        run["torch linear_cross_entropy (sum)"] = torch_fused
    else:
        left_out["torch linear_cross_entropy (sum)"] = f"torch {torch.__version__} has none"
    return run, left_out


def error_of(path: Path, hidden: Tensor, weight: Tensor, targets: Tensor) -> float | None:
    """Max |delta log-prob| over some rows against float64 of the same inputs; None for a path that returns a sum."""
    rows = slice(0, min(ERROR_ROWS, hidden.shape[0]))
    with torch.no_grad():
        result = path(hidden, weight, targets)
        if result.ndim == 0:
            return None
        exact = materialised_logprob(hidden[rows].double(), weight.double(), targets[rows]).logprob
        return float((result[rows].double() - exact).abs().max())


def inputs(tokens: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Peaked rows, as a trained head has them: the target's logit leads by some 15, the others are of size 3."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, device=device)
    weight = torch.randn(vocab, width, generator=generator, device=device) * (3 / width**0.5)
    targets = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    hidden += weight[targets] * (15 / 9)
    return hidden.to(dtype), weight.to(dtype), targets


def run_case(case: tuple[int, int, int], arguments: argparse.Namespace, device: str, dtype: torch.dtype, peak: float) -> dict[str, Any]:
    tokens, width, vocab = case
    hidden, weight, targets = inputs(*case, dtype, device)
    hidden.requires_grad_()
    weight.requires_grad_()
    upstream = torch.linspace(-1, 1, tokens, device=device)
    run, _ = paths(device, arguments.compile)
    print_header(
        f"T = {tokens}, H = {width}, V = {vocab}: limit {2e3 * tokens * width * vocab / peak:.2f} ms forward, three times that in all"
    )
    contenders: list[Contender] = []
    for name, path in run.items():
        error = error_of(path, hidden, weight, targets)

        def forward(path: Path = path) -> None:
            with torch.no_grad():
                path(hidden, weight, targets)

        def both(path: Path = path) -> None:
            out = path(hidden, weight, targets)
            out.backward(None if out.ndim == 0 else upstream.to(out.dtype))

        for what, function, factor in (("forward", forward, 2), ("forward+backward", both, 6)):
            contenders.append(Contender(name, what, function, [hidden, weight], factor * tokens * width * vocab, error))
    results = measure(contenders, peak=peak, device=device, repeats=arguments.repeats)
    print_rows(results)
    return {"tokens": tokens, "width": width, "vocab": vocab, "results": results}


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="T,H,V", help="instead of the default cases; may be repeated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the materialised path")
    return parser.parse_args()


def chosen_cases(arguments: argparse.Namespace, device: str) -> list[tuple[int, int, int]]:
    if arguments.case is None:
        return CUDA_CASES if device == "cuda" else CPU_CASES
    cases = []
    for text in arguments.case:
        tokens, width, vocab = (int(part) for part in text.split(","))
        cases.append((tokens, width, vocab))
    return cases


def main() -> None:
    arguments, device = parse(__doc__), default_device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peak = matmul_peak(device, dtype)
    print(f"{device}, {dtype}: matmul peak {peak / 1e12:.3f} TFLOP/s")
    cases = [run_case(case, arguments, device, dtype, peak) for case in chosen_cases(arguments, device)]
    for name, reason in paths(device, arguments.compile)[1].items():
        print(f"left out: {name}: {reason}")
    print_json("linear_logprob", device, dtype, peak, cases)


if __name__ == "__main__":
    main()
