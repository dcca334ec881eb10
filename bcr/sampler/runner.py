"""The two forward passes of the sampler: prefill a prompt, decode one token for a block of slots.

Both call the decoder that is being trained; only the attention object differs: here keys and values come from the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bcr.model import Decoder
from bcr.model.attention import PackedAttention
from bcr.sampler.kv_cache import KVCache, readable

SPAN = 256


def prefill(model: Decoder, prompt_ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [P,K,D] of every layer for a prompt of P tokens. A prompt runs alone: nothing else can change its numbers."""
    if not prompt_ids:
        return []
    device = model.embed_tokens.weight.device
    attention = KeepingAttention(len(prompt_ids), device)
    model(torch.tensor(prompt_ids, device=device), torch.arange(len(prompt_ids), device=device), attention)
    return attention.kept


class KeepingAttention(PackedAttention):
    """Causal attention over one prompt that keeps each layer's keys and values."""

    def __init__(self, length: int, device: torch.device) -> None:
        super().__init__([length], device)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.kept.append((key, value))
        return super().__call__(layer, query, key, value)


def decode(model: Decoder, cache: KVCache, slots: slice, token_ids: Tensor, positions: Tensor) -> Tensor:
    """Logits [B,V] after one more token in each of the B slots; `positions` [B] is where that token stands (= tokens cached before it)."""
    attention = CachedAttention(cache, slots, positions)
    hidden = model(token_ids, positions, attention)
    return model.logits(hidden)


class CachedAttention:
    """One query for each slot over what is cached there, the new token included.

    Written out as two batched products and a softmax: the fused CPU kernel gives a row other last bits on another thread. Places beyond a
    row's own length weigh exactly 0, so a row's sums do not see its neighbours' lengths as long as the products take the same path. They
    do from SHORTEST places on, in multiples of ALIGN, and up to SPAN places at a time where the sum runs over the context.
    """

    def __init__(self, cache: KVCache, slots: slice, positions: Tensor) -> None:
        self.cache, self.slots, self.positions = cache, slots, positions
        self.rows = torch.arange(positions.shape[0], device=positions.device)
        self.length = readable(int(positions.max()) + 1)
        self.unseen = (torch.arange(self.length, device=positions.device) > positions[:, None])[:, None, None, :]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer][self.slots], self.cache.values[layer][self.slots]
        keys[self.rows, :, self.positions] = key
        values[self.rows, :, self.positions] = value
        rows, query_heads, head_dim = query.shape
        grouped = (query * head_dim**-0.5).view(rows, key.shape[1], -1, head_dim)  # [B, K, Q/K, D]: the queries of each key head
        scores = grouped @ keys[:, :, : self.length].transpose(-1, -2)
        weights = scores.float().masked_fill_(self.unseen, float("-inf")).softmax(dim=-1).to(value.dtype)
        spans = (slice(start, min(start + SPAN, self.length)) for start in range(0, self.length, SPAN))
        parts = [weights[..., span] @ values[:, :, span] for span in spans]
        return sum(parts[1:], start=parts[0]).view(rows, query_heads, head_dim)
