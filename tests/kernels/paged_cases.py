"""A paged cache at random, and its attention in float64 written out one query and head at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}  # of values of size 1: bfloat16 rounds weights and results


@dataclass
class Paged:
    """The arguments of `paged_attention`."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    context_lengths: Tensor
    cu_query_lengths: Tensor

    def arguments(self, device: str = "cpu") -> list[Tensor]:
        return [tensor.to(device) for tensor in vars(self).values()]


def paged(
    contexts: Sequence[int],
    counts: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    width: int | None = None,
    share: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Paged:
    """Sequences of `contexts` tokens whose last `counts` are queries; scattered blocks, of which the first is common to all with `share`.

    Unused places of the cache and of the tables hold what would show if it were read: infinities, and blocks that do not exist.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-context // block_size) for context in contexts]
    width = max([*needed, 1]) if width is None else width
    blocks = sum(needed) + 2
    order = torch.randperm(blocks, generator=generator).tolist()
    tables = torch.full((len(contexts), width), 2**30, dtype=torch.int32)
    caches = [torch.full((blocks, block_size, kv_heads, head_dim), float("nan")) for _ in range(2)]
    common = order.pop()
    for row, (context, count) in enumerate(zip(contexts, needed, strict=True)):
        ids = [order.pop() for _ in range(count)]
        if share and ids and context >= block_size:
            ids[0] = common
        tables[row, :count] = torch.tensor(ids, dtype=torch.int32)
        for place in range(context):
            for cache in caches:
                cache[ids[place // block_size], place % block_size] = torch.randn(kv_heads, head_dim, generator=generator)
    q = 2 * torch.randn(sum(counts), heads, head_dim, generator=generator)
    ends = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(list(contexts), dtype=torch.int32)
    return Paged(q.to(dtype), caches[0].to(dtype), caches[1].to(dtype), tables, lengths, ends)


def exact(case: Paged, scale: float | None = None) -> Tensor:
    """[Tq, Hq, D] float64, from the rounded inputs and the definition alone."""
    q, keys, values = (tensor.double() for tensor in (case.q, case.k_cache, case.v_cache))
    size, group = keys.shape[1], q.shape[1] // keys.shape[2]
    out = torch.zeros_like(q)
    for row, context in enumerate(case.context_lengths.tolist()):
        first, stop = case.cu_query_lengths[row : row + 2].tolist()
        places = [(int(case.block_tables[row, n // size]), n % size) for n in range(context)]
        for token in range(first, stop):
            seen = places[: context - (stop - token) + 1]
            if not seen:
                continue
            block, offset = torch.tensor(seen).t()
            for head in range(q.shape[1]):
                k, v = keys[block, offset, head // group], values[block, offset, head // group]
                weights = torch.softmax(k @ q[token, head] * (q.shape[2] ** -0.5 if scale is None else scale), 0)
                out[token, head] = weights @ v
    return out
