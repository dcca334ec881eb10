"""`transformers` on the sampler bench's workloads: `generate` in batches, and its continuous batching in a process with a time limit.

As a program (`python -m bench._sampler_peers MODEL_FOLDER DEVICE < work.json`) this file runs the continuous batching and prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, PreTrainedModel

from bcr.sampler import Request

PAGE, BATCH_TOKENS = 32, 512


def load(folder: str | Path, device: str) -> PreTrainedModel:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype).to(device).eval()


class LogProbs(LogitsProcessor):
    """Log-probs of the tokens as they come: of each row of logits at the next step, when its token is known.

    `generate` would also give all logits at its end, float32: 159 GB for 256 rows, 1,024 steps and a vocabulary of 151,936.
    """

    def __init__(self) -> None:
        self.logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finish(input_ids)
        self.logits = scores
        return scores

    def finish(self, sequences: Tensor) -> None:
        if self.logits is not None:
            torch.log_softmax(self.logits, -1).gather(1, sequences[:, -1:])


@torch.no_grad()
def generate(peer: PreTrainedModel, requests: Sequence[Request], n: int, batch_size: int) -> dict[str, float]:
    """Batches in the order of the requests, padded on the left, each until its longest output is written, with log-probs.

    On CUDA keys and values get their memory once for a batch; torch would go looking for more of it at every step.
    """
    cache = {"cache_implementation": "static", "disable_compile": True} if peer.device.type == "cuda" else {}
    rows = [request for request in requests for _ in range(n)]
    torch.manual_seed(0)
    begun, steps = time.perf_counter(), 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width, new = max(len(row.prompt_ids) for row in batch), max(row.max_new_tokens for row in batch)
        ids = torch.tensor([[0] * (width - len(row.prompt_ids)) + row.prompt_ids for row in batch], device=peer.device)
        mask = torch.tensor([[0] * (width - len(row.prompt_ids)) + [1] * len(row.prompt_ids) for row in batch], device=peer.device)
        logprobs, length = LogProbs(), {"max_new_tokens": new, "min_new_tokens": new}
        logprobs.finish(peer.generate(ids, attention_mask=mask, **length, do_sample=True, top_k=0, logits_processor=[logprobs], **cache))
        steps += new
    if peer.device.type == "cuda":
        torch.cuda.synchronize()
    return {"tokens": sum(row.max_new_tokens for row in rows), "seconds": time.perf_counter() - begun, "steps": steps}


def continuous(folder: str | Path, device: str, requests: Sequence[Request], n: int, limit_s: float) -> dict[str, float] | str:
    """Tokens and seconds of its continuous batching, without log-probs; a sentence where it fails or does not return in time."""
    work = json.dumps([[request.prompt_ids, request.max_new_tokens] for request in requests for _ in range(n)])
    command = [sys.executable, "-m", "bench._sampler_peers", str(folder), device]
    try:
        done = subprocess.run(command, input=work, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"did not return within {limit_s:.0f} s"
    if done.returncode:
        return "failed: " + (done.stderr.strip().splitlines() or ["without a word"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def main(folder: str, device: str) -> None:
    """It takes one budget for all: requests of like budget go together, in four parts; useful tokens count. With log-probs.

    The cache is given the size of the work. Left to itself it takes all free memory, and with `scaled_dot_product_attention` fills a mask
    of 8,192 rows as long as that cache before it begins: minutes on a CPU.
    """
    peer = load(folder, device)
    rows = sorted(json.load(sys.stdin), key=lambda row: row[1])
    quarter = -(-len(rows) // 4)
    parts = [rows[start : start + quarter] for start in range(0, len(rows), quarter)]
    pages = max(sum(-(-(len(prompt) + part[-1][1]) // PAGE) for prompt, _ in part) for part in parts)
    settings = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=BATCH_TOKENS, return_logprobs=True)
    begun = 0.0
    for part in [[(rows[0][0], 2)], *parts]:  # the first is a warm-up
        budget = GenerationConfig(max_new_tokens=part[-1][1], do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
        out = peer.generate_batch([prompt for prompt, _ in part], generation_config=budget, continuous_batching_config=settings)
        assert all(len(found.generated_tokens) == part[-1][1] for found in out.values())
        assert len(out) == len(part)
        begun = begun or time.perf_counter()
    print(json.dumps({"tokens": sum(new for _, new in rows), "seconds": time.perf_counter() - begun}))


if __name__ == "__main__":
    main(*sys.argv[1:])
