"""Launches the kernels of the paged cache: the same functions as `paged_reference`, for tensors on CUDA (or under the interpreter)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from bcr_kernels._triton import attention_kernels as kernels
from bcr_kernels._triton.attention_tiles import SPAN, decode_tile, prefill_tile
from bcr_kernels._triton.backend import LOG2E


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
    """See `paged_reference.attention`. At most three launches: sequences of one query, the merge of their spans, the other sequences."""
    q = _heads_contiguous(q)
    tokens, heads, head_dim = q.shape
    (sequences, table_width), (_, block_size, kv_heads, _) = block_tables.shape, k_cache.shape
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    group, spans = heads // kv_heads, triton.cdiv(max(1, table_width * block_size), SPAN)
    split = spans > 1
    span_out = torch.empty((spans, sequences, heads, head_dim) if split else 1, dtype=torch.float32, device=q.device)
    span_lse = torch.empty((spans, sequences, heads) if split else 1, dtype=torch.float32, device=q.device)
    tables, lengths, ends = block_tables.contiguous(), context_lengths.contiguous(), cu_query_lengths.contiguous()
    shape = {"HEAD_DIM": head_dim, "SPAN": SPAN, "DIM": max(16, triton.next_power_of_2(head_dim))}

    def launch(decode: bool) -> None:
        tile = decode_tile(q, group) if decode else prefill_tile(q)
        row_tiles = sequences * triton.cdiv(group, tile.rows) if decode else tokens * group // tile.rows + sequences
        kernels.attention_kernel[(row_tiles, kv_heads, spans if decode else 1)](
            q, k_cache, v_cache, tables, lengths, ends, out, span_out, span_lse, scale * LOG2E, q.stride(0), sequences, table_width,
            KV_HEADS=kv_heads, GROUP=group, BLOCK_SIZE=block_size, ROWS=tile.rows, COLS=tile.cols, DECODE=decode,
            num_warps=tile.warps, num_stages=tile.stages, **shape,
        )  # fmt: skip

    with torch.cuda.device_of(q):
        launch(decode=True)
        if split:
            kernels.merge_spans_kernel[(sequences, heads)](
                span_out, span_lse, lengths, ends, out, sequences, HEADS=heads, num_warps=1, **shape
            )
        if max_query_length is None or max_query_length > 1:
            launch(decode=False)
    return out


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """See `paged_reference.store`."""
    if k.shape[0] == 0:
        return
    k, v, width = _heads_contiguous(k), _heads_contiguous(v), k.shape[1] * k.shape[2]
    with torch.cuda.device_of(k):
        kernels.store_kernel[(k.shape[0],)](
            k, v, k_cache, v_cache, slots.contiguous(), k.stride(0), v.stride(0), width, triton.next_power_of_2(width), num_warps=4
        )


def _heads_contiguous(tokens: Tensor) -> Tensor:
    """[T, heads, D] whose tokens may lie apart (a view into a fused projection) but are whole in themselves."""
    _, heads, head_dim = tokens.shape
    whole = tokens.stride(2) == 1 and (tokens.stride(1) == head_dim or heads == 1)
    return tokens if whole else tokens.contiguous()
