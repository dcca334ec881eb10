"""One decode step's head: hidden states to tokens and their log-probs, ours beside its peers. `python -m bench.linear_sample [--help]`.

A case is B, H, V. The limit is the weight read once at the rate of a large copy on CUDA, and the product 2BHV at the matmul peak on a CPU.
"error" is max |delta log-prob| of the sampled tokens against float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcr_kernels import linear_sample
from bcr_kernels.reference import materialised_logprob
from bench._protocol import Contender, copy_rate, default_device, matmul_peak, measure, print_header, print_json, print_rows

Path = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]  # hidden[B, H], weight[V, H], keys[B] -> token[B], log-prob[B]
CUDA_CASES = [(batch, *head) for batch in (16, 64, 256) for head in ((1024, 151_936), (1536, 151_936), (2560, 151_936))]
CPU_CASES = [(64, 256, 4096), (64, 256, 32_768)]


def ours(hidden: Tensor, weight: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    return tuple(linear_sample(hidden, weight, keys))  # type: ignore[return-value]


def ours_without_logprob(hidden: Tensor, weight: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    return linear_sample(hidden, weight, keys, with_logprob=False).token, None


def ours_greedy(hidden: Tensor, weight: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    return tuple(linear_sample(hidden, weight, keys, temperature=0.0))  # type: ignore[return-value]


def multinomial(hidden: Tensor, weight: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """Whole logits, log-softmax and torch's own sampler, whose stream of random numbers depends on the batch."""
    logprobs = F.log_softmax(F.linear(hidden, weight).float(), -1)
    token = torch.multinomial(logprobs.exp(), 1)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1)


def exponential_race(hidden: Tensor, weight: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
    """The trick of most samplers: probabilities over exponential noise, again from a stream."""
    logprobs = F.log_softmax(F.linear(hidden, weight).float(), -1)
    token = logprobs.exp().div_(torch.empty_like(logprobs).exponential_()).argmax(-1, keepdim=True)
    return token.squeeze(1), logprobs.gather(1, token).squeeze(1)


PATHS: dict[str, Path] = {
    "ours": ours,
    "ours, without log-prob": ours_without_logprob,
    "ours, greedy": ours_greedy,
    "softmax, multinomial": multinomial,
    "softmax, exponential race": exponential_race,
}


def run_case(case: tuple[int, int, int], device: str, dtype: torch.dtype, peak: float, copied: float, repeats: int) -> dict[str, Any]:
    batch, width, vocab = case
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(batch, width, generator=generator, device=device).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator, device=device) * (3 / width**0.5)).to(dtype)
    keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator, device=device)
    flop = 2 * batch * width * vocab
    limit = weight.nbytes / copied if device == "cuda" else flop / peak
    print_header(f"B = {batch}, H = {width}, V = {vocab}: limit {limit * 1e3:.3f} ms")
    contenders = []
    for name, path in PATHS.items():

        def run(path: Path = path) -> tuple[Tensor, Tensor | None]:
            with torch.no_grad():
                return path(hidden, weight, keys)

        token, logprob = run()
        exact = materialised_logprob(hidden.double(), weight.double(), token).logprob
        error = None if logprob is None else float((logprob.double() - exact).abs().max())
        contenders.append(Contender(name, "one step", run, [], limit, error))
    results = measure(contenders, peak=1.0, device=device, repeats=repeats)  # the work is a time already: see `limit`
    print_rows(results)
    return {"batch": batch, "width": width, "vocab": vocab, "limit_seconds": limit, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="B,H,V", help="instead of the default cases; may be repeated")
    parser.add_argument("--repeats", type=int, default=15)
    arguments, device = parser.parse_args(), default_device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    peak, copied = matmul_peak(device, dtype), copy_rate(device)
    print(f"{device}, {dtype}: matmul peak {peak / 1e12:.3f} TFLOP/s, copy {copied / 1e9:.1f} GB/s")
    chosen = CUDA_CASES if device == "cuda" else CPU_CASES
    if arguments.case is not None:
        chosen = [tuple(int(part) for part in text.split(",")) for text in arguments.case]  # type: ignore[misc]
    print_json("linear_sample", device, dtype, peak, [run_case(case, device, dtype, peak, copied, arguments.repeats) for case in chosen])


if __name__ == "__main__":
    main()
