"""How fast does the sampler write? `python -m bench.sampler [requests=64] [longest=256] [groups=8] [budget=256] [peers=1] [repeats=3]`

A Qwen3-shaped model of 4 layers, 256 wide (4 query heads, 2 key/value heads of 64, vocabulary 4,096) with random weights, float32, on
a CPU. Two workloads, with log-probs on and no stop token, so that every path writes the same number of useful tokens:

    uniform   `requests` prompts with input and output lengths uniform in longest/5 .. longest (nano-vllm's benchmark, scaled)
    groups    `groups` prompts of 300 tokens, 8 rollouts each, output lengths log-normal up to `budget` (bundles of BCR)

Peers in the same run, on the same weights: `transformers` `generate` in batches of 32 in the order of the requests (a batch runs to its
longest output; only useful tokens count) with log-probs, and, with peers=2, its continuous batching without them (needs psutil). Beside
the tokens a second stands the share of the limit: the multiply-adds that cannot be avoided over the matmul rate, plus the keys and values
that must be read over the copy rate, both measured in the same run. Peak memory is the rise of the resident set during a run.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from bcr.model import Decoder, DecoderConfig, save_pretrained
from bcr.runtime.host import settle_in
from bcr.sampler import Request, Sampler, SamplingParams, engine
from bench._protocol import _reset_peak, _resident_peak, matmul_peak, seconds_of

GROUP, PROMPT, PEER_BATCH = 8, 300, 32
NO_STOP = 10**9  # outside every vocabulary: a completion ends at its budget


def small_qwen3() -> Decoder:
    config = DecoderConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return Decoder(config).init_weights(0, std=0.1)


def uniform(count: int, longest: int, rng: random.Random) -> tuple[list[Request], int]:
    lengths = [(rng.randint(longest // 5, longest), rng.randint(longest // 5, longest)) for _ in range(count)]
    return [Request(f"u{k}", [rng.randrange(4096) for _ in range(prompt)], new) for k, (prompt, new) in enumerate(lengths)], 1


def grouped(count: int, budget: int, rng: random.Random) -> tuple[list[Request], int]:
    """The rollouts of a group are equally long: a budget is a request's, and random weights never stop by themselves."""
    prompts = [[rng.randrange(4096) for _ in range(PROMPT)] for _ in range(count)]
    lengths = [max(1, min(budget, int(rng.lognormvariate(0, 0.6) * budget / 2))) for _ in prompts]
    return [Request(f"g{k}", prompt, length) for k, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))], GROUP


class Watched:
    """Runs of the sampler, with the time to each request's first token and the number of decoding steps."""

    def __init__(self, model: Decoder, **options: Any) -> None:
        self.sampler = Sampler(model, **options)

    def run(self, requests: Sequence[Request], n: int) -> dict[str, float]:
        steps: list[float] = []
        first: dict[int, float] = {}
        step = Sampler._step

        def timed(sampler: Sampler, plan: engine.Plan, *rest: Any) -> engine.Step:
            done = step(sampler, plan, *rest)
            steps.append(time.perf_counter())
            for draft in plan.live:
                first.setdefault(id(draft), steps[-1])
            return done

        Sampler._step = timed  # type: ignore[method-assign]
        try:
            begun = time.perf_counter()
            groups = self.sampler.generate(requests, SamplingParams(1.0, n, (NO_STOP,)))
            seconds = time.perf_counter() - begun
        finally:
            Sampler._step = step  # type: ignore[method-assign]
        tokens = sum(len(rollout.token_ids) for group in groups for rollout in group)
        assert tokens == n * sum(request.max_new_tokens for request in requests)
        waits = [moment - begun for moment in first.values()]
        return {"tokens": tokens, "seconds": seconds, "steps": len(steps), "first_token": statistics.median(waits)}


@torch.no_grad()
def transformers_generate(peer: PreTrainedModel, requests: Sequence[Request], n: int) -> dict[str, float]:
    """Batches in the order of the requests, padded on the left, each until its longest output is written."""
    rows = [request for request in requests for _ in range(n)]
    torch.manual_seed(0)
    begun, steps = time.perf_counter(), 0
    for start in range(0, len(rows), PEER_BATCH):
        batch = rows[start : start + PEER_BATCH]
        width, new = max(len(row.prompt_ids) for row in batch), max(row.max_new_tokens for row in batch)
        ids = torch.tensor([[0] * (width - len(row.prompt_ids)) + row.prompt_ids for row in batch])
        mask = torch.tensor([[0] * (width - len(row.prompt_ids)) + [1] * len(row.prompt_ids) for row in batch])
        out = peer.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            top_k=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for logits, token in zip(out.logits, out.sequences[:, width:].T, strict=True):
            torch.log_softmax(logits, -1).gather(1, token[:, None])
        steps += new
    return {"tokens": sum(row.max_new_tokens for row in rows), "seconds": time.perf_counter() - begun, "steps": steps}


def transformers_continuous(peer: PreTrainedModel, requests: Sequence[Request], n: int) -> dict[str, float]:
    """Its continuous batching takes one budget for all: requests of like budget go together, in four parts; useful tokens count."""
    rows = sorted((request for request in requests for _ in range(n)), key=lambda row: row.max_new_tokens)
    quarter = -(-len(rows) // 4)
    begun = time.perf_counter()
    for start in range(0, len(rows), quarter):
        part = rows[start : start + quarter]
        settings = GenerationConfig(max_new_tokens=part[-1].max_new_tokens, do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
        out = peer.generate_batch([row.prompt_ids for row in part], generation_config=settings, progress_bar=False)
        assert len(out) == len(part)
    return {"tokens": sum(row.max_new_tokens for row in rows), "seconds": time.perf_counter() - begun}


def limit_seconds(model: Decoder, requests: Sequence[Request], n: int, flops: float, bytes_per_s: float) -> float:
    """Arithmetic of every token that must go through the model once (a group's prompt once), and each new token's keys and values read."""
    config = model.config
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.embed_tokens.weight.numel()
    head = model.head_weight.numel()
    place = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    share = config.num_attention_heads // config.num_key_value_heads
    arithmetic = traffic = 0.0
    for request in requests:
        prompt, new = len(request.prompt_ids), request.max_new_tokens
        read = n * sum(range(prompt, prompt + new)) * place
        arithmetic += 2 * matrices * (prompt - 1 + n * new) + 2 * head * n * new + 2 * share * read / 4
        traffic += read
    return arithmetic / flops + traffic / bytes_per_s


def measured(name: str, run: Callable[[], dict[str, float]], limit: float, repeats: int) -> dict[str, Any]:
    before = _reset_peak("cpu")
    results = [run() for _ in range(repeats)]
    best = sorted(results, key=lambda result: result["seconds"])[len(results) // 2]
    seconds = best["seconds"]
    record = {"name": name, **best, "tokens_per_s": best["tokens"] / seconds, "limit": limit / seconds, "bytes": _resident_peak() - before}
    rate = f"{best['steps'] / seconds:8.1f}" if "steps" in best else f"{'':8}"
    wait = f"{best['first_token']:10.3f}" if "first_token" in best else f"{'':10}"
    print(f"  {name:38} {record['tokens_per_s']:10,.0f} {rate} {wait} {record['limit']:8.0%} {record['bytes'] / 1e6:10,.0f}", flush=True)
    return record


def main(requests: int = 64, longest: int = 256, groups: int = 8, budget: int = 256, peers: int = 1, repeats: int = 3) -> None:
    settle_in(None)
    model, rng = small_qwen3(), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        peer = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    flops = matmul_peak("cpu", torch.float32)
    block = torch.zeros(2**26)
    bytes_per_s = 2 * block.nbytes / min(seconds_of(lambda: block.clone(), "cpu") for _ in range(6))
    print(f"{torch.get_num_threads()} threads, {flops / 1e9:.0f} GFLOP/s, {bytes_per_s / 1e9:.1f} GB/s copied")
    cases = []
    for name, (work, n) in {"uniform": uniform(requests, longest, rng), "groups": grouped(groups, budget, rng)}.items():
        limit = limit_seconds(model, work, n, flops, bytes_per_s)
        print(f"\n{name}: {len(work)} requests x {n}")
        print(f"  {'':38} {'tokens/s':>10} {'steps/s':>8} {'1st token':>10} {'limit':>8} {'MB':>10}")
        ours = Watched(model)
        ours.run(work[:2], n)
        results = [measured("bcr.sampler", lambda work=work, n=n, ours=ours: ours.run(work, n), limit, repeats)]
        if peers:
            rows = {"transformers generate": transformers_generate}
            if peers > 1:
                rows["transformers continuous batching"] = transformers_continuous
            for title, run in rows.items():
                results.append(measured(title, lambda run=run, work=work, n=n: run(peer, work, n), limit, 1))
            fastest = max(result["tokens_per_s"] for result in results[1:])
            print(f"  {results[0]['tokens_per_s'] / fastest:.1f} times the faster peer")
        cases.append({"case": name, "results": results})
    machine = {"device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__, "flops": flops, "bytes_per_s": bytes_per_s}
    print(json.dumps({"bench": "sampler", **machine, "cases": cases}))


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (argument.split("=") for argument in sys.argv[1:])})
