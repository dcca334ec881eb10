"""The Triton kernels of the paged cache: attention in tiles of (query, head) rows, the merge of a context's spans, and the store.

The query heads that share a key head share its tile: row i of a tile is query i // GROUP and head i % GROUP of one key head. Scores are in
base 2: `scale` carries log2(e). Whatever depends on a sequence's lengths is decided on the device, so that no launch waits for them.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from bcr_kernels._triton import INTERPRETED
from bcr_kernels._triton.kernels import _dot, _round_to

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _weighted_sum(weights, values, acc):
    """acc[M, N] += weights[M, K] @ values[K, N]; the weights rounded to the dtype of the values, as tensor cores take them."""
    weights = _round_to(weights, values.dtype)
    if _INTERPRETED:
        weights = weights.to(tl.float32)
        values = values.to(tl.float32)
    return tl.dot(weights, values, acc, input_precision="ieee")


@triton.jit
def _sequence_of(program, cu_query_lengths, sequences, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """(sequence, tile in it) of a prefill program. Sequence r owns the programs from cu[r] * GROUP // ROWS + r on: enough for its rows."""
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_query_lengths + middle) * GROUP // ROWS + middle <= program:
            low = middle
        else:
            high = middle
    return low, program - (tl.load(cu_query_lengths + low) * GROUP // ROWS + low)


@triton.jit(do_not_specialize=["sequences", "table_width"])
def attention_kernel(
    q, k_cache, v_cache, block_tables, context_lengths, cu_query_lengths, out, span_out, span_lse, scale, q_stride, sequences, table_width,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr, DECODE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One key head's attention for ROWS (query, head) rows of one sequence.

    DECODE: sequences of exactly one query; grid (sequences * row tiles, KV_HEADS, spans), and a program reads SPAN positions. Where the
    context has one span, the result goes to out[token, head]; where it has more, span_out[span, sequence, head] gets the span's own
    result and span_lse[span, sequence, head] its log2-sum-exp2, for `merge_spans_kernel`.
    Else: sequences of several queries; grid (programs, KV_HEADS), and a program reads all that its last row sees.
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    kv_head, span = tl.program_id(1), tl.program_id(2)
    if DECODE:
        sequence = tl.program_id(0) // tl.cdiv(GROUP, ROWS)
        tile = tl.program_id(0) % tl.cdiv(GROUP, ROWS)
    else:
        sequence, tile = _sequence_of(tl.program_id(0), cu_query_lengths, sequences, GROUP, ROWS)
    token = tl.load(cu_query_lengths + sequence)
    count = tl.load(cu_query_lengths + sequence + 1) - token
    context = tl.load(context_lengths + sequence)
    if DECODE:
        if (count != 1) | (span * SPAN >= tl.maximum(context, 1)):
            return
    else:
        if (count <= 1) | (tile * ROWS >= count * GROUP):
            return

    row = tile * ROWS + tl.arange(0, ROWS)
    query, head = row // GROUP, kv_head * GROUP + row % GROUP
    inside = query < count
    position = context - count + query
    dim = tl.arange(0, DIM)
    real = dim < HEAD_DIM
    q_place = (token + query).to(tl.int64) * q_stride + head * HEAD_DIM
    queries = tl.load(q + q_place[:, None] + dim[None, :], mask=inside[:, None] & real[None, :], other=0.0)

    begin = span * SPAN if DECODE else 0
    end = tl.minimum(context, context - count + (tile * ROWS + ROWS - 1) // GROUP + 1)
    if DECODE:
        end = tl.minimum(end, begin + SPAN)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_width
    for start in range(begin, end, COLS):
        col = start + tl.arange(0, COLS)
        cached = col < end
        block = tl.load(table + col // BLOCK_SIZE, mask=cached, other=0)
        place = ((block.to(tl.int64) * BLOCK_SIZE + col % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        mask = cached[:, None] & real[None, :]
        keys = tl.load(k_cache + place[:, None] + dim[None, :], mask=mask, other=0.0)
        scores = _dot(queries, keys, tl.zeros((ROWS, COLS), tl.float32)) * scale
        scores = tl.where(cached[None, :] & (col[None, :] <= position[:, None]), scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        fade = tl.exp2(top - shift)
        weights = tl.exp2(scores - shift[:, None])
        total = total * fade + tl.sum(weights, 1)
        values = tl.load(v_cache + place[:, None] + dim[None, :], mask=mask, other=0.0)
        acc = _weighted_sum(weights, values, acc * fade[:, None])
        top = highest

    result = acc / tl.where(total == 0, 1.0, total)[:, None]  # nothing seen: zeros
    keep = inside[:, None] & real[None, :]
    if DECODE and context > SPAN:
        part = (span.to(tl.int64) * sequences + sequence) * HEADS + head
        tl.store(span_out + part[:, None] * HEAD_DIM + dim[None, :], result, mask=keep)
        tl.store(span_lse + part, top + tl.log2(total), mask=inside)
    else:
        out_place = ((token + query).to(tl.int64) * HEADS + head) * HEAD_DIM
        tl.store(out + out_place[:, None] + dim[None, :], _round_to(result, out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["sequences"])
def merge_spans_kernel(
    span_out, span_lse, context_lengths, cu_query_lengths, out, sequences,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """out[token, head] of each sequence with one query and more than one span, its spans added in order; grid (sequences, HEADS)."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(cu_query_lengths + sequence)
    count = tl.load(cu_query_lengths + sequence + 1) - token
    context = tl.load(context_lengths + sequence)
    if (count != 1) | (context <= SPAN):
        return
    dim = tl.arange(0, DIM)
    real = dim < HEAD_DIM
    top = float("-inf")
    total = 0.0
    acc = tl.zeros((DIM,), tl.float32)
    apart = tl.zeros((), tl.int64) + sequences * HEADS
    for span in range(tl.cdiv(context, SPAN)):
        part = span * apart + sequence * HEADS + head
        lse = tl.load(span_lse + part)
        highest = tl.maximum(top, lse)
        fade, share = tl.exp2(top - highest), tl.exp2(lse - highest)
        total = total * fade + share
        acc = acc * fade + share * tl.load(span_out + part * HEAD_DIM + dim, mask=real, other=0.0)
        top = highest
    place = (token.to(tl.int64) * HEADS + head) * HEAD_DIM
    tl.store(out + place + dim, _round_to(acc / total, out.dtype.element_ty), mask=real)


@triton.jit
def store_kernel(k, v, k_cache, v_cache, slots, k_stride, v_stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """k_cache[slots[t]] = k[t] and v_cache[slots[t]] = v[t], rows of WIDTH = heads * dimension; one program per token; -1 is skipped."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    at = tl.arange(0, PADDED)
    written = (at < WIDTH) & (slot >= 0)
    tl.store(k_cache + slot * WIDTH + at, tl.load(k + token * k_stride + at, mask=written), mask=written)
    tl.store(v_cache + slot * WIDTH + at, tl.load(v + token * v_stride + at, mask=written), mask=written)
