"""A mixture of SwiGLU experts (Qwen3-MoE): every token goes through the few that a router picks for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bcr.model.mlp import SwiGLU


class MixtureOfExperts(nn.Module):
    """sum over a token's `chosen` most probable experts of probability * expert(x), [T,H] -> [T,H].

    Probabilities are the router's softmax in float32; with `normalise` those of the chosen ones sum to 1. Simple form: one expert after
    the other, each on its tokens. How many those are depends on the batch, so here a row's last bits do too (contract 9 does not hold).
    """

    def __init__(self, hidden_size: int, intermediate_size: int, experts: int, chosen: int, normalise: bool) -> None:
        super().__init__()
        self.chosen, self.normalise = chosen, normalise
        self.gate = nn.Linear(hidden_size, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(hidden_size, intermediate_size) for _ in range(experts))

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.gate(hidden)
        probability, expert_of = torch.softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1).topk(self.chosen)
        if self.normalise:
            probability = probability / probability.sum(dim=-1, keepdim=True)
        probability = probability.to(hidden.dtype)
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            token, place = (expert_of == number).nonzero(as_tuple=True)
            if len(token) or torch.is_grad_enabled():  # ranks sum gradients by expert, so each has one for all, be it 0
                out = out.index_add(0, token, expert(hidden[token]) * probability[token, place, None])
        return out
