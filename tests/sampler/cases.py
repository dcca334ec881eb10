"""Requests of many lengths, how they are sampled, and what the tests compare rollouts with."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bcr.model import Decoder, save_pretrained
from bcr.model.attention import PackedAttention
from bcr.sampler import Request, Rollout, SamplingParams

CPU = torch.device("cpu")
VOCABULARY = 97
STOPS = (1, 2, 3)


def make_requests(lengths: Sequence[int], budgets: Sequence[int], seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(f"r{number}", [rng.randrange(VOCABULARY) for _ in range(length)], budget)
        for number, (length, budget) in enumerate(zip(lengths, budgets, strict=True))
    ]


MIXED = make_requests([1, 9, 2, 30, 16, 17, 5, 64, 3, 12, 33, 1, 7], [40, 12, 1, 25, 33, 8, 60, 20, 5, 17, 30, 3, 48])
SAMPLED = SamplingParams(1.0, n=3, stop_token_ids=STOPS, seed=5)


def by_id(groups: Sequence[Sequence[Rollout]]) -> dict[str, list[Rollout]]:
    return {group[0].request_id: list(group) for group in groups}


@torch.no_grad()
def forward_logprobs(model: Decoder, prompt_ids: list[int], token_ids: list[int], temperature: float = 1.0) -> tuple[list[float], float]:
    """Log-probs of a completion from one forward pass over prompt and completion, and the mean entropy [nats] there."""
    tokens = torch.tensor(prompt_ids + token_ids[:-1])
    hidden = model(tokens, torch.arange(len(tokens)), PackedAttention([len(tokens)], CPU))
    logprobs = torch.log_softmax(hidden[len(prompt_ids) - 1 :] @ model.head_weight.T / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    return logprobs.gather(1, torch.tensor(token_ids)[:, None]).squeeze(1).tolist(), float(entropy)


def as_transformers(model: Decoder, folder: Path) -> PreTrainedModel:
    save_pretrained(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()
