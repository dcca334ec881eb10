"""`paged_attention` and `store_kv`: causal attention over a cache of keys and values in blocks, and the writes into it.

A cache is [blocks, block_size, Hkv, D]. Token n of sequence r lies at place block_tables[r, n // block_size] * block_size + n % block_size
of the cache read as [blocks * block_size, Hkv, D]; such a place is a *slot*. Blocks may be shared by sequences. Block size is free: one
block may span a whole request.
"""

from __future__ import annotations

import itertools
from types import ModuleType

import torch
from torch import Tensor

from bcr_kernels import paged_reference
from bcr_kernels._checks import FLOATS, check_vector, describe, is_dtensor, is_number, require, values_are_checked
from bcr_kernels._rows import Backend, choose_backend

LARGEST_HEAD = 256


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lengths: Tensor,
    cu_query_lengths: Tensor,
    *,
    scale: float | None = None,
    max_query_length: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """softmax(scale * q k^T) v of every query over what its sequence has cached, up to and with the query's own position. No gradient.

    q[Tq, Hq, D]: queries of R sequences laid end to end, bfloat16, float32 or float64 (reference backend only). D is at most 256.
    k_cache, v_cache[blocks, block_size, Hkv, D]: contiguous, of q's dtype. Hkv divides Hq: head h reads key head h // (Hq / Hkv).
    block_tables[R, max_blocks] int32: only the entries that a sequence's context needs are read.
    context_lengths[R] int32: tokens cached of each sequence, the queries' own included (`store_kv` comes first).
    cu_query_lengths[R + 1] int32: 0, then the end of each sequence's queries in q. A sequence's queries are the last positions of its
        context. It may have none; with a context of 0 its queries get zeros (the idle rows of a captured graph).
    scale: of the scores, by default D ** -0.5.
    max_query_length: the longest query, if the caller knows. With 1 the prefill kernel is not launched.
    backend: "auto" takes Triton for bfloat16 and float32 on CUDA; "triton" and "reference" force.

    Returns out[Tq, Hq, D] in q's dtype; softmax and sums are float32 (float64 for float64), and products of float32 are never TF32.

    How a query is computed depends on its own sequence alone: one query (decode) or several (prefill), and the context in spans of fixed
    length. So neither the other sequences, nor the width of the table, nor the place of its blocks changes a bit of it.
    Raises ValueError, beginning with the argument's name, for what does not fit. Lengths and tables are read for that on a CPU, and on
    CUDA only after `set_debug(True)`.
    """
    _check_cache("k_cache", k_cache, q)
    _check_cache("v_cache", v_cache, q)
    require(v_cache.shape == k_cache.shape, "v_cache", f"must be {list(k_cache.shape)} like k_cache, got {list(v_cache.shape)}")
    require(q.shape[1] % k_cache.shape[2] == 0, "q", f"needs a multiple of the {k_cache.shape[2]} key heads as heads, got {q.shape[1]}")
    _check_lengths(q, k_cache, block_tables, context_lengths, cu_query_lengths, max_query_length)
    require(scale is None or is_number(scale), "scale", f"must be None or a finite number, got {scale!r}")
    with torch.no_grad():
        module = _backend_module(choose_backend(backend, q, name="q", float32_on_triton=True))
        factor = q.shape[2] ** -0.5 if scale is None else float(scale)
        return module.attention(q, k_cache, v_cache, block_tables, context_lengths, cu_query_lengths, factor, max_query_length)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, *, backend: Backend = "auto") -> None:
    """Write k[T, Hkv, D] and v[T, Hkv, D] into the caches [blocks, block_size, Hkv, D] in place, token t at slots[t]; -1 skips a token.

    slots[T] int64: block * block_size + offset. No slot twice in a call: which of its tokens would stay is not said.
    All of one dtype and device; k and v may be strided views, the caches are contiguous. Raises ValueError, beginning with the
    argument's name, for what does not fit; slots are read for that on a CPU, and on CUDA only after `set_debug(True)`.
    """
    _check_cache("k_cache", k_cache, k, name="k")
    _check_cache("v_cache", v_cache, k, name="k")
    require(v_cache.shape == k_cache.shape, "v_cache", f"must be {list(k_cache.shape)} like k_cache, got {list(v_cache.shape)}")
    require(isinstance(v, Tensor) and v.shape == k.shape, "v", f"must be {list(k.shape)} like k, got {describe(v)}")
    require(v.dtype == k.dtype and v.device == k.device, "v", f"must be {k.dtype} on {k.device} like k, got {describe(v)}")
    require(k.shape[1] == k_cache.shape[2], "k", f"must have the {k_cache.shape[2]} heads of k_cache, got {k.shape[1]}")
    check_vector("slots", slots, k, integer=True)
    require(slots.dtype == torch.int64, "slots", f"must be int64, got {slots.dtype}")
    if values_are_checked(slots):
        places = k_cache.shape[0] * k_cache.shape[1]
        good = (slots >= -1) & (slots < places)
        require(bool(good.all()), "slots", f"must be -1 or in [0, {places})")
    with torch.no_grad():
        _backend_module(choose_backend(backend, k, name="k", float32_on_triton=True)).store(k, v, k_cache, v_cache, slots)


def _backend_module(name: str) -> ModuleType:
    """The module that has `attention` and `store`."""
    if name == "reference":
        return paged_reference
    from bcr_kernels._triton import attention_backend

    return attention_backend


def _check_cache(cache_name: str, cache: Tensor, tokens: Tensor, *, name: str = "q") -> None:
    """tokens[T, heads, D] and a contiguous cache[blocks, block_size, Hkv, D] of its dtype, device and head dimension."""
    require(isinstance(tokens, Tensor) and tokens.ndim == 3, name, f"must be a tensor [tokens, heads, D], got {describe(tokens)}")
    require(not is_dtensor(tokens), name, "is a DTensor; pass a whole tensor")
    require(tokens.dtype in FLOATS, name, f"must be bfloat16, float32 or float64, got {tokens.dtype}")
    require(1 <= tokens.shape[2] <= LARGEST_HEAD, name, f"must have a head dimension of 1 to {LARGEST_HEAD}, got {tokens.shape[2]}")
    require(isinstance(cache, Tensor) and cache.ndim == 4, cache_name, f"must be [blocks, block_size, Hkv, D], got {describe(cache)}")
    require(not is_dtensor(cache), cache_name, "is a DTensor; pass a whole tensor")
    require(cache.dtype == tokens.dtype, cache_name, f"must be {tokens.dtype} like {name}, got {cache.dtype}")
    require(cache.device == tokens.device, cache_name, f"must be on {tokens.device} like {name}, got {cache.device}")
    require(cache.shape[3] == tokens.shape[2], cache_name, f"must have {name}'s head dimension {tokens.shape[2]}, got {cache.shape[3]}")
    require(cache.shape[1] >= 1 and cache.shape[2] >= 1, cache_name, f"needs a block size and a head, got {list(cache.shape)}")
    require(cache.is_contiguous(), cache_name, "must be contiguous: it is read and written in place")


def _check_lengths(
    q: Tensor, k_cache: Tensor, block_tables: Tensor, context_lengths: Tensor, cu_query_lengths: Tensor, max_query_length: int | None
) -> None:
    for name, tensor, dims in (("block_tables", block_tables, 2), ("context_lengths", context_lengths, 1)):
        good = isinstance(tensor, Tensor) and tensor.ndim == dims and tensor.dtype == torch.int32
        require(good, name, f"must be an int32 tensor [R{', max_blocks' if dims == 2 else ''}], got {describe(tensor)}")
        require(tensor.device == q.device, name, f"must be on {q.device} like q, got {tensor.device}")
    sequences = block_tables.shape[0]
    require(context_lengths.shape[0] == sequences, "context_lengths", f"must be [{sequences}], one per row of block_tables")
    check_vector("cu_query_lengths", cu_query_lengths, q, integer=True, length=sequences + 1)
    require(cu_query_lengths.dtype == torch.int32, "cu_query_lengths", f"must be int32, got {cu_query_lengths.dtype}")
    known = max_query_length is None or (isinstance(max_query_length, int) and max_query_length >= 0)
    require(known, "max_query_length", f"must be None or a count, got {max_query_length!r}")
    if values_are_checked(q):
        _check_values(q, k_cache, block_tables, context_lengths, cu_query_lengths, max_query_length)


def _check_values(
    q: Tensor, k_cache: Tensor, block_tables: Tensor, context_lengths: Tensor, cu_query_lengths: Tensor, max_query_length: int | None
) -> None:
    ends, contexts = cu_query_lengths.tolist(), context_lengths.tolist()
    counts = [stop - start for start, stop in itertools.pairwise(ends)]
    require(ends[0] == 0 and min(counts, default=0) >= 0, "cu_query_lengths", f"must begin with 0 and never fall, got {ends}")
    require(ends[-1] == q.shape[0], "cu_query_lengths", f"must end with the {q.shape[0]} queries, got {ends[-1]}")
    longest = max(counts, default=0)
    enough = max_query_length is None or longest <= max_query_length
    require(enough, "max_query_length", f"is {max_query_length}, but a sequence has {longest} queries")
    blocks, size = k_cache.shape[:2]
    for row, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        places = block_tables.shape[1] * size
        holds = f"must be 0, or at least its {count} queries and at most the {places} places of its blocks, got {context} at sequence {row}"
        require(context == 0 or count <= context <= places, "context_lengths", holds)
    needed = (context_lengths[:, None] + (size - 1)) // size > torch.arange(block_tables.shape[1], device=q.device)[None, :]
    good = ~needed | ((block_tables >= 0) & (block_tables < blocks))
    require(bool(good.all()), "block_tables", f"must be in [0, {blocks}) wherever a context reaches")
