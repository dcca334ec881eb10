"""The plain PyTorch meaning of `paged_attention` and `store_kv`, and their CPU path.

A sequence of several queries is attended to on its own, by `scaled_dot_product_attention` over its gathered context. Sequences of one
query, the rows of a decode step, go together: SPAN positions of all of them at a time, merged by the running maximum of each row. Every
product there has the shape of one row's span whatever the batch, so a row's bits are its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bcr_kernels._matmul import compute_dtype, exact_float32, wide

SPAN = 128


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    cu_query_lengths: Tensor,
    scale: float,
    max_query_length: int | None,
) -> Tensor:
    """See `paged_attention`; the arguments are checked."""
    out = torch.zeros_like(q)
    contexts, ends = context_lengths.tolist(), cu_query_lengths.tolist()
    single = []
    with exact_float32(q.device):
        for row, context in enumerate(contexts):
            queries = slice(ends[row], ends[row + 1])
            if queries.stop - queries.start == 1:
                single.append(row)
            elif queries.stop > queries.start and context > 0:
                keys, values = (_gather(cache, block_tables[row], context) for cache in (k_cache, v_cache))
                out[queries] = _prefill(q[queries], keys, values, scale)
        single = sorted((row for row in single if contexts[row] > 0), key=lambda row: -contexts[row])
        if single:
            rows = torch.tensor(single, device=q.device)
            at = cu_query_lengths[:-1][rows].long()
            lengths = [contexts[row] for row in single]
            out[at] = _decode(q[at], k_cache, v_cache, block_tables[rows].long(), lengths, scale).to(q.dtype)
    return out


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """See `store_kv`; the arguments are checked."""
    kept = (slots >= 0).nonzero().squeeze(1)
    for tokens, cache in ((k, k_cache), (v, v_cache)):
        cache.flatten(0, 1).index_copy_(0, slots[kept], tokens[kept])


def _gather(cache: Tensor, table: Tensor, context: int) -> Tensor:
    """[context, Hkv, D]: what one sequence has cached, in order."""
    blocks = -(-context // cache.shape[1])
    return cache[table[:blocks].long()].flatten(0, 1)[:context]


def _prefill(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q[Q, Hq, D] are the last Q positions of keys[C, Hkv, D], values[C, Hkv, D]."""
    count, context = q.shape[0], keys.shape[0]
    seen = None
    if count < context:
        place = torch.arange(context, device=q.device)
        seen = place[None, :] <= place[context - count :, None]
    query, key, value = (x.transpose(0, 1)[None] for x in (q, keys, values))
    grouped = q.shape[1] != keys.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lengths: list[int], scale: float) -> Tensor:
    """q[R, Hq, D], one query of each of R sequences, longest first; lengths[R] are their contexts. [R, Hq, D] in the compute dtype."""
    (rows, _, head_dim), size, kv_heads = q.shape, k_cache.shape[1], k_cache.shape[2]
    keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    grouped = (wide(q) * scale).view(rows, kv_heads, -1, head_dim)
    top = torch.full(grouped.shape[:3], torch.finfo(grouped.dtype).min, dtype=grouped.dtype, device=q.device)
    total, acc = torch.zeros_like(top), torch.zeros_like(grouped)
    length = torch.tensor(lengths, device=q.device)
    place = torch.arange(SPAN, device=q.device)
    for start in range(0, lengths[0], SPAN):
        live = sum(context > start for context in lengths)  # the first rows: they are in order of length
        position = torch.minimum(start + place, length[:live, None] - 1)
        slot = tables[:live].gather(1, position // size) * size + position % size
        # Copied to [live, Hkv, SPAN, D]: a product reads a lone row's view along another path, with other last bits.
        k, v = (wide(cache[slot]).transpose(1, 2).contiguous() for cache in (keys, values))
        scores = (grouped[:live] @ k.transpose(2, 3)).masked_fill_((start + place >= length[:live, None])[:, None, None], float("-inf"))
        highest = torch.maximum(top[:live], scores.amax(3))
        fade = (top[:live] - highest).exp_()
        weights = scores.sub_(highest[..., None]).exp_()
        total[:live] = total[:live] * fade + weights.sum(3)
        acc[:live] = acc[:live] * fade[..., None] + weights @ v
        top[:live] = highest
    return (acc / total[..., None]).view(q.shape).to(compute_dtype(q))
