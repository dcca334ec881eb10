"""How fast does the sampler write? `python -m bench.sampler [name=value ...]`

    device=cpu        cpu | cuda
    shape=small       small (Qwen3 of 4 layers, 256 wide, vocabulary 4,096) | tiny | qwen3-0.6b | qwen2-1.5b | qwen3-4b; random weights
    requests=64       of the workload `uniform`: input and output lengths uniform in shortest .. longest, as in nano-vllm's benchmark, whose
    shortest=51         own numbers are requests=256 shortest=100 longest=1024
    longest=256
    groups=8          of the workload `groups`: prompts of 300 tokens, 8 rollouts each, output lengths log-normal up to `budget`
    budget=256
    peers=1           0: none. 1: transformers' `generate`. 2: also its continuous batching, in a process that gets `limit_s` seconds
    peer_batch=32     rows of a batch of `generate`
    repeats=3         runs of ours; the median counts. Peers run once
    limit_s=120

Every path writes the same number of useful tokens, for nothing stops before its budget, all with log-probs but where a row says otherwise.
`limit`: the share of the least time that the workload could take (`limit_seconds` in `_sampler_work.py` has the formula) at the matmul and
copy rates measured in the same run. Memory is the peak of a run above what stood before it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from bcr.model import Decoder, save_pretrained
from bcr.runtime.host import settle_in
from bcr.sampler import Request, Sampler, SamplingParams, runner, sampling
from bcr.sampler.invariance import check_invariance
from bench import _sampler_peers as peers_of
from bench._protocol import _reset_peak, _resident_peak, copy_rate, matmul_peak, seconds_of
from bench._sampler_work import NO_STOP, apart, decoder, grouped, limit_seconds, uniform

ON_CUDA: dict[str, Any] = {"cache_mb": 32768, "step_tokens": 8192}


class Watched:
    """Runs of the sampler, with the time to each rollout's first token as the host reads it, and the number of steps."""

    def __init__(self, model: Decoder, **options: Any) -> None:
        self.sampler = Sampler(model, **options)

    def __call__(self, requests: Sequence[Request], n: int) -> dict[str, float]:
        moments: list[float] = []
        first: dict[int, float] = {}
        read = runner.Step.read

        def timed(step: runner.Step) -> tuple[list[int], list[float]]:
            found = read(step)
            moments.append(time.perf_counter())
            for draft in step.drafts:
                first.setdefault(id(draft), moments[-1])
            return found

        with mock.patch.object(runner.Step, "read", timed):
            begun = time.perf_counter()
            groups = self.sampler.generate(requests, SamplingParams(1.0, n, (NO_STOP,)))
            seconds = time.perf_counter() - begun
        tokens = sum(len(rollout.token_ids) for group in groups for rollout in group)
        assert tokens == n * sum(request.max_new_tokens for request in requests)
        wait = statistics.median(moment - begun for moment in first.values())
        return {"tokens": tokens, "seconds": seconds, "steps": len(moments), "first_token": wait}


@contextlib.contextmanager
def without_logprobs() -> Iterator[None]:
    with mock.patch.object(sampling, "logprob_of_logits", lambda logits, tokens: logits[:, 0]):
        yield


def measured(name: str, run: Callable[[], dict[str, float] | str], limit: float, repeats: int, device: str) -> dict[str, Any]:
    before = _reset_peak(device)
    results = [run() for _ in range(repeats)]
    if isinstance(results[0], str):
        print(f"  {name:38} {results[0]}", flush=True)
        return {"name": name, "missing": results[0]}
    middle = sorted(results, key=lambda result: result["seconds"])[len(results) // 2]  # type: ignore[index]
    assert not isinstance(middle, str)
    seconds = middle["seconds"]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _resident_peak()
    record = {"name": name, **middle, "tokens_per_s": middle["tokens"] / seconds, "limit": limit / seconds, "bytes": peak - before}
    rate = f"{middle['steps'] / seconds:8.1f}" if "steps" in middle else f"{'':8}"
    wait = f"{middle['first_token']:10.3f}" if "first_token" in middle else f"{'':10}"
    print(f"  {name:38} {record['tokens_per_s']:10,.0f} {rate} {wait} {record['limit']:8.0%} {record['bytes'] / 1e6:10,.0f}", flush=True)
    return record


def warmed(name: str, run: Callable[[], dict[str, float] | str], limit: float, repeats: int, device: str) -> dict[str, Any]:
    """`measured`, on CUDA after one run that does not count: the first captures a graph for every number of rows."""
    if device == "cuda":
        run()
    return measured(name, run, limit, repeats, device)


def case(name: str, ours: Watched, work: list[Request], n: int, limit: float, options: dict[str, Any], folder: str) -> dict[str, Any]:
    """Ours, its variants and its peers on one workload."""
    device, repeats = options["device"], options["repeats"]
    print(f"\n{name}: {len(work)} requests x {n}, {n * sum(request.max_new_tokens for request in work):,} tokens to write")
    print(f"  {'':38} {'tokens/s':>10} {'steps/s':>8} {'1st token':>10} {'limit':>8} {'MB':>10}")
    ours(work[:2], n)
    results = [warmed("bcr.sampler", lambda: ours(work, n), limit, repeats, device)]
    held = ours.sampler._cache
    assert held is not None
    memory = {"weights": sum(p.nbytes for p in ours.sampler.model.parameters()), "cache": held.memory.nbytes}
    if device == "cpu":
        with without_logprobs():
            results.append(measured("bcr.sampler, no log-probs", lambda: ours(work, n), limit, repeats, device))
    else:  # there a second product with the head, in the captured steps
        ours.sampler.release_cache()
        silent = Watched(ours.sampler.model, **ON_CUDA, paged_options={"with_logprob": False})
        results.append(warmed("bcr.sampler, no log-probs", lambda: silent(work, n), limit, repeats, device))
        silent.sampler.release_cache()
    if n > 1:
        lone = apart(work, n)
        results.append(warmed("bcr.sampler, no fork", lambda: ours(lone, 1), limit, repeats, device))
    ours.sampler.release_cache()
    if options["peers"]:
        peer = peers_of.load(folder, device)
        run = lambda: peers_of.generate(peer, work, n, options["peer_batch"])  # noqa: E731
        theirs = [measured("transformers generate", run, limit, 1, device)]
        del peer
        gc.collect()  # its memory is the next workload's
        if options["peers"] > 1:
            run = lambda: peers_of.continuous(folder, device, work, n, options["limit_s"])  # noqa: E731
            theirs.append(measured("transformers continuous batching", run, limit, 1, device))
        fastest = max(result["tokens_per_s"] for result in theirs if "missing" not in result)
        print(f"  {results[0]['tokens_per_s'] / fastest:.1f} times the faster peer")
        results += theirs
    print("  " + ", ".join(f"{part} {size / 1e6:,.0f} MB" for part, size in memory.items()))
    return {"case": name, "results": results, "memory": memory}


def main(**given: Any) -> None:
    defaults: dict[str, Any] = {
        "device": "cpu", "shape": "small", "requests": 64, "shortest": 51, "longest": 256, "groups": 8, "budget": 256, "peers": 1,
        "peer_batch": 32, "repeats": 3, "limit_s": 120,
    }  # fmt: skip
    if unknown := sorted(set(given) - set(defaults)):
        raise ValueError(f"{unknown[0]!r} is no argument of this bench; it takes {', '.join(defaults)}.")
    options = {key: type(value)(given.get(key, value)) for key, value in defaults.items()}
    device = options["device"]
    settle_in(None)
    model, rng = decoder(options["shape"], device), random.Random(0)
    vocabulary = model.config.vocab_size
    flops, bytes_per_s = matmul_peak(device, model.head_weight.dtype), copy_rate(device)
    rates = f"{flops / 1e9:,.0f} GFLOP/s, {bytes_per_s / 1e9:,.1f} GB/s copied"
    print(f"{options['shape']} on {device}, {torch.get_num_threads()} threads, {rates}")
    check = seconds_of(lambda: check_invariance(model, 16), device) if device == "cpu" else None
    if check is not None:
        print(f"asking the machine whether it keeps rows apart, once a sampler: {1e3 * check:.0f} ms; no switch changes the arithmetic")
    work = {
        "uniform": uniform(options["requests"], options["shortest"], options["longest"], vocabulary, rng),
        "groups": grouped(options["groups"], options["budget"], vocabulary, rng),
    }
    with tempfile.TemporaryDirectory() as folder:
        if options["peers"]:
            save_pretrained(model, folder)
        ours = Watched(model, **({} if device == "cpu" else ON_CUDA))
        cases = [
            case(name, ours, requests, n, limit_seconds(model, requests, n, flops, bytes_per_s), options, folder)
            for name, (requests, n) in work.items()
            if requests
        ]
    found = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "flops": flops, "bytes_per_s": bytes_per_s}
    machine = {**found, "threads": torch.get_num_threads(), "torch": torch.__version__, "check_seconds": check}
    print(json.dumps({"bench": "sampler", "options": options, **machine, "cases": cases}))


if __name__ == "__main__":
    main(**dict(argument.split("=") for argument in sys.argv[1:]))
