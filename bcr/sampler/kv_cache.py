"""Keys and values of everything in flight, in blocks. Which block is whose, `blocks.py` and `scheduler.py` know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bcr.model import DecoderConfig
from bcr.sampler.batch import upload


class KVCache:
    """`keys[layer]`, `values[layer]`: [blocks, K, block_size, D], or [blocks, block_size, K, D] for the CUDA kernels (`token_major`).

    On a CPU a block holds a whole request, so that attention reads keys in place: gathering blocks costs several times the attention.
    There keys lie transposed, [blocks, K, D, block_size] behind that shape: their product with queries reads memory 1.6 times as fast.
    Unwritten places hold zeros: masked or not, they must be finite.
    """

    def __init__(
        self, config: DecoderConfig, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device, *, token_major: bool = False
    ) -> None:
        self.blocks, self.block_size, self.token_major, self.device = blocks, block_size, token_major, device
        heads, size = config.num_key_value_heads, config.head_dim
        shape = (blocks, block_size, heads, size) if token_major else (blocks, heads, block_size, size)
        self.memory = torch.zeros(2, config.num_hidden_layers, *shape, dtype=dtype, device=device)
        keys, values = self.memory
        if not token_major:
            keys = keys.view(*keys.shape[:3], size, block_size).transpose(3, 4)
        self.keys, self.values = list(keys.unbind(0)), list(values.unbind(0))

    @staticmethod
    def bytes_per_block(config: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * block_size * dtype.itemsize

    def store(self, layer: int, key: Tensor, value: Tensor, blocks: Tensor, places: Tensor) -> None:
        """Write key[T,K,D] and value[T,K,D]: token t to place `places[t]` of block `blocks[t]`. Not for `token_major` (`store_kv`)."""
        self.keys[layer][blocks, :, places] = key
        self.values[layer][blocks, :, places] = value

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy (source, target, tokens) of blocks, all at once: a target may be a source. As many tokens of each as of the longest."""
        if not copies:
            return
        longest = max(count for _, _, count in copies)
        sources, targets = upload([copy[:2] for copy in copies], torch.int64, self.device).t()
        keys, values = self.memory
        if self.token_major:
            parts, dim = [keys[:, :, :longest], values[:, :, :longest]], 1
        else:  # a layer at a time, for what is on its way takes memory
            lying = keys.view(*keys.shape[:3], -1, self.block_size)[..., :longest]
            parts, dim = [*lying.unbind(0), *values[:, :, :, :longest].unbind(0)], 0
        for part in parts:
            part.index_copy_(dim, targets, part.index_select(dim, sources))
