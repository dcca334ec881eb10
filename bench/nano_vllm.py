"""The workload of nano-vllm's own benchmark: `python -m bench.nano_vllm [name=value ...]`

    requests=256      input and output lengths uniform in shortest .. longest, random tokens; nothing stops before its budget
    shortest=100
    longest=1024
    shape=small       Qwen3 of 4 layers, 256 wide, vocabulary 4,096, random weights, float32, on a CPU (`_sampler_work.py`)
    peer_batch=32     rows of a batch of transformers' `generate`, in the order of the requests, each batch as long as its longest
    continuous=0      1: transformers' continuous batching too, of every 16th request by budget; it gets `limit_s` seconds
    limit_s=200
    results=          a JSON file; what it holds already is not measured again. bench/results/nano_vllm_cpu.json is one
    seconds=0         0: all in one go. Else no part begins that would end later, going by the longest so far: call again for the rest

It is minutes of work, so it has parts: ours is one, each batch of `generate` is one. Ours and theirs write log-probs. Memory is the peak
of the resident set above what stood before; the limit is that of `bench.sampler`, at the rates of the process that measured the part.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bcr.model import save_pretrained
from bcr.runtime.host import settle_in
from bench import _sampler_peers as peers_of
from bench._protocol import copy_rate, matmul_peak
from bench._sampler_work import decoder, limit_seconds, uniform
from bench.sampler import Watched, measured

OURS, CONTINUOUS = "bcr.sampler", "continuous batching"
DEFAULTS: dict[str, Any] = {
    "requests": 256, "shortest": 100, "longest": 1024, "shape": "small", "peer_batch": 32, "continuous": 0, "limit_s": 200, "results": "",
    "seconds": 0.0,
}  # fmt: skip
WORK = ("requests", "shortest", "longest", "shape", "peer_batch")  # what results of one file have in common


def main(**given: Any) -> dict[str, Any]:
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise ValueError(f"{unknown[0]!r} is no argument of this bench; it takes {', '.join(DEFAULTS)}.")
    options = {key: type(value)(given.get(key, value)) for key, value in DEFAULTS.items()}
    begun, file = time.perf_counter(), Path(options["results"]) if options["results"] else None
    work = {key: options[key] for key in WORK}
    found = json.loads(file.read_text()) if file and file.exists() else {"bench": "nano_vllm", "work": work, "parts": {}}
    if found["work"] != work:
        raise ValueError(f"results {str(file)!r} are of other work: {found['work']}; this run asks for {work}.")
    settle_in(None)
    parts = found["parts"]
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: run for name, run in contenders(options, folder).items() if name not in parts}
        rates = {"flops": matmul_peak("cpu", torch.float32), "bytes_per_s": copy_rate("cpu")} if runs else {}
        machine = {**rates, "threads": torch.get_num_threads(), "torch": torch.__version__}
        for name, (run, limit) in runs.items():
            longest = max((part["seconds"] for other, part in parts.items() if other.split()[0] == name.split()[0]), default=0.0)
            if options["seconds"] and time.perf_counter() - begun + 1.1 * longest > options["seconds"]:
                break
            parts[name] = measured(name, run, limit(rates["flops"], rates["bytes_per_s"]), 1, "cpu") | machine
            if name == CONTINUOUS:
                parts[name]["bytes"] = 0  # it runs in another process
            if file:
                file.write_text(json.dumps(found, indent=1) + "\n")
    found["table"] = table(parts, options)
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return found


def contenders(options: dict[str, Any], folder: str) -> dict[str, tuple[Callable[[], Any], Callable[[float, float], float]]]:
    """name: (run, the least seconds for its requests at a matmul and a copy rate); parts of `generate` are "generate 1", ..."""
    model, rng = decoder(options["shape"], "cpu"), random.Random(0)
    requests, _ = uniform(options["requests"], options["shortest"], options["longest"], model.config.vocab_size, rng)
    save_pretrained(model, folder)
    peer, size = peers_of.load(folder, "cpu"), options["peer_batch"]

    def ours() -> dict[str, float]:
        watched = Watched(model)
        watched(requests[:2], 1)
        return watched(requests, 1)

    batches = [requests[start : start + size] for start in range(0, len(requests), size)]
    some = sorted(requests, key=lambda request: request.max_new_tokens)[8::16]
    runs = {OURS: (ours, requests)}
    runs |= {f"generate {k}": (lambda batch=batch: peers_of.generate(peer, batch, 1, size), batch) for k, batch in enumerate(batches, 1)}
    if options["continuous"]:
        runs[CONTINUOUS] = (lambda: peers_of.continuous(folder, "cpu", some, 1, options["limit_s"]), some)
    return {name: (run, lambda flops, rate, work=work: limit_seconds(model, work, 1, flops, rate)) for name, (run, work) in runs.items()}


def table(parts: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What is known by now: of each path seconds, tokens a second and share of the limit; ours over theirs once all batches are there."""
    theirs = [part for name, part in parts.items() if name.startswith("generate")]
    rows = {name: [parts[name]] for name in (OURS, CONTINUOUS) if name in parts} | ({"generate": theirs} if theirs else {})
    whole = len(theirs) == -(-options["requests"] // options["peer_batch"])
    sums = {}
    print(f"\n{'':24} {'tokens':>9} {'seconds':>9} {'tokens/s':>9} {'limit':>6} {'MB':>7}")
    for name, some in rows.items():
        if "missing" in some[0]:
            continue
        tokens, seconds = (sum(part[key] for part in some) for key in ("tokens", "seconds"))
        limit = sum(part["limit"] * part["seconds"] for part in some) / seconds
        peak = max(part["bytes"] for part in some)
        sums[name] = {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "limit": limit, "bytes": peak}
        note = "" if name != "generate" or whole else f"  ({len(theirs)} batches)"
        print(f"{name:24} {tokens:9,} {seconds:9.1f} {tokens / seconds:9,.0f} {limit:6.0%} {peak / 1e6:7,.0f}{note}")
    if whole and OURS in sums:
        sums["ratio"] = sums[OURS]["tokens_per_s"] / sums["generate"]["tokens_per_s"]
        print(f"{sums['ratio']:.1f} times generate")
    return sums


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
