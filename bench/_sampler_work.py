"""What the sampler's bench runs: shapes with random weights, two workloads, and the limit that no sampler can beat on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from bcr.model import Decoder, DecoderConfig
from bcr.sampler import Request

GROUP, PROMPT = 8, 300  # rollouts and prompt tokens of a bundle
NO_STOP = 10**9  # outside every vocabulary: a completion ends at its budget

SHAPES: dict[str, dict[str, Any]] = {  # the sizes of the models' config.json
    "tiny": {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
    "small": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
    "qwen3-0.6b": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    "qwen2-1.5b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                   "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True,
                   "qk_norm": False, "qkv_bias": True},
    "qwen3-4b": {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
}  # fmt: skip


def decoder(shape: str, device: str) -> Decoder:
    """bfloat16 on CUDA, float32 on a CPU. Small models get weights that give their text some entropy."""
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; it must be one of {', '.join(SHAPES)}.")
    config = DecoderConfig(max_position_embeddings=4096, **SHAPES[shape])
    with torch.device(device):
        model = Decoder(config)
    model = model.to(torch.bfloat16 if device == "cuda" else torch.float32)
    if shape in ("tiny", "small"):
        return model.init_weights(0, std=0.1)
    generator = torch.Generator(device).manual_seed(0)  # drawn there: billions of numbers take minutes on a CPU
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    return model


def uniform(count: int, shortest: int, longest: int, vocabulary: int, rng: random.Random) -> tuple[list[Request], int]:
    lengths = [(rng.randint(shortest, longest), rng.randint(shortest, longest)) for _ in range(count)]
    return [Request(f"u{k}", _prompt(size, vocabulary, rng), new) for k, (size, new) in enumerate(lengths)], 1


def grouped(count: int, budget: int, vocabulary: int, rng: random.Random) -> tuple[list[Request], int]:
    """The rollouts of a group are equally long: a budget is a request's, and random weights never stop by themselves."""
    prompts = [_prompt(PROMPT, vocabulary, rng) for _ in range(count)]
    lengths = [max(1, min(budget, int(rng.lognormvariate(0, 0.6) * budget / 2))) for _ in prompts]
    return [Request(f"g{k}", prompt, length) for k, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))], GROUP


def apart(requests: Sequence[Request], n: int) -> list[Request]:
    """The same rollouts as requests of their own, whose prompts are prefilled one by one."""
    return [Request(f"{request.id}.{k}", request.prompt_ids, request.max_new_tokens) for request in requests for k in range(n)]


def _prompt(length: int, vocabulary: int, rng: random.Random) -> list[int]:
    return [rng.randrange(vocabulary) for _ in range(length)]


def limit_seconds(model: Decoder, requests: Sequence[Request], n: int, flops: float, bytes_per_s: float) -> float:
    """The least time for a workload: arithmetic / matmul rate + bytes / copy rate.

    Arithmetic: two operations for each weight and each token that must go through the model once (a group's prompt once), the head for new
    tokens alone, the queries' products with the context. Bytes: each new token's keys and values, and on CUDA the weights once for every
    step, of which there are at least as many as the longest budget; on a CPU they stay in the cache and are not counted.
    """
    config, weight = model.config, model.head_weight
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    place = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    share = config.num_attention_heads // config.num_key_value_heads
    arithmetic = traffic = 0.0
    for request in requests:
        prompt, new = len(request.prompt_ids), request.max_new_tokens
        read = n * sum(range(prompt, prompt + new)) * place
        arithmetic += 2 * matrices * (prompt - 1 + n * new) + 2 * weight.numel() * n * new + 2 * share * read
        traffic += read * weight.dtype.itemsize
    if weight.is_cuda:
        traffic += max(request.max_new_tokens for request in requests) * (matrices + weight.numel()) * weight.dtype.itemsize
    return arithmetic / flops + traffic / bytes_per_s
