"""Keys and values of the rollouts in flight: one contiguous slot for each, read in place.

A slot is a row of [slots, K, capacity, D] tensors, two for each layer. Gathering pages would cost a CPU several times the
attention itself; a slot of the full length of a request costs nothing to read. Live slots are kept together at the front.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bcr.model import Decoder, DecoderConfig

ALIGN, SHORTEST = 16, 64  # attention reads a multiple of ALIGN places and never fewer than SHORTEST: see `runner.CachedAttention`


class KVCache:
    """`keys[layer]`, `values[layer]`: [slots, K, capacity, D]. Unwritten places hold zeros: masked or not, they must be finite."""

    def __init__(self, config: DecoderConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots, self.capacity = slots, readable(capacity)
        shape = (slots, config.num_key_value_heads, self.capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    @staticmethod
    def bytes_per_slot(model: Decoder, capacity: int) -> int:
        config = model.config
        places = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * readable(capacity)
        return 2 * places * model.embed_tokens.weight.element_size()

    def holds(self, slots: int, capacity: int) -> bool:
        return slots <= self.slots and capacity <= self.capacity

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole slots, so that the live ones stay together when others leave."""
        for cached in (*self.keys, *self.values):
            cached[targets] = cached[sources]

    def fill(self, slots: slice, prefix: list[tuple[Tensor, Tensor]]) -> None:
        """Write a prompt's keys and values, one (keys[P,K,D], values[P,K,D]) a layer, to the start of each of the slots: a fork."""
        for layer, (key, value) in enumerate(prefix):
            self.keys[layer][slots, :, : key.shape[0]] = key.transpose(0, 1)
            self.values[layer][slots, :, : value.shape[0]] = value.transpose(0, 1)


def readable(length: int) -> int:
    """How many places attention reads to cover `length` of them."""
    return max(SHORTEST, round_up(length, ALIGN))


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
