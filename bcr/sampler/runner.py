"""The two forward passes of the sampler: prefill a prompt, decode one token for a block of slots.

Both call the decoder that is being trained; only the attention object differs: here keys and values come from the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bcr.model import Decoder
from bcr.model.attention import PackedAttention
from bcr.sampler.kv_cache import ALIGN, KVCache, round_up


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
    return F.linear(hidden, model.head_weight)


class CachedAttention:
    """One query for each slot over what is cached there, the new token included."""

    def __init__(self, cache: KVCache, slots: slice, positions: Tensor) -> None:
        self.cache, self.slots, self.positions = cache, slots, positions
        self.rows = torch.arange(positions.shape[0], device=positions.device)
        self.length = min(cache.capacity, round_up(int(positions.max()) + 1, ALIGN))
        self.mask = (torch.arange(self.length, device=positions.device) <= positions[:, None])[:, None, None, :]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer][self.slots], self.cache.values[layer][self.slots]
        keys[self.rows, :, self.positions] = key
        values[self.rows, :, self.positions] = value
        out = F.scaled_dot_product_attention(
            query[:, :, None, :],
            keys[:, :, : self.length],
            values[:, :, : self.length],
            attn_mask=self.mask,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.squeeze(2)
