"""The Triton kernels. R rows (tokens of a chunk), V vocabulary, H = WIDTH hidden; a program makes one ROWS x COLS tile of logits.

Every kernel works in base 2: `scale` is log2(e) / temperature and `anchor` is in units of log2, so that exp2 needs no further product.
No tensor here is larger than a chunk; offsets into [R, V] are 64-bit all the same. All tensors are contiguous; PITCH, the row length
of a stored [R, V], is V rounded up to a whole number of tiles, so that stores need no mask over columns. R and V are not specialised
on: one compilation serves every batch.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from bcr_kernels._triton import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
TAKEN_OUT = tl.constexpr(-1e30)  # a logit whose exponential is 0, finite so that 0 * logit is 0


@triton.jit
def _dot(a, b, acc):
    """acc[M, N] += a[M, K] @ b[N, K].T with float32 accumulators; float32 operands are never rounded to TF32.

    The interpreter would multiply the bit patterns of bfloat16. Products of two bfloat16 are exact in float32, so widening first gives
    what the tensor cores give.
    """
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, tl.trans(b), acc, input_precision="ieee")


@triton.jit
def _round_to(value, dtype: tl.constexpr):
    """float32 to the dtype of storage, to nearest even, also in the interpreter, which would cut the low bits of a bfloat16 off."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _tile(rows, vocab, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """Which tile this program makes: (row tile, column tile). GROUP row tiles share the columns of the weight while they are in L2."""
    row_tiles, col_tiles = tl.cdiv(rows, ROWS), tl.cdiv(vocab, COLS)
    program = tl.program_id(0)
    first = (program // (GROUP * col_tiles)) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    place = program % (GROUP * col_tiles)
    return first + place % size, place // size


@triton.jit
def _products(
    hidden,
    weight,
    row,
    col,
    rows,
    vocab,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """hidden[row : row + ROWS] @ weight[col : col + COLS].T, float32; zero outside both. With TMA the first two are tensor descriptors."""
    acc = tl.zeros((ROWS, COLS), tl.float32)
    if TMA:
        for k in range(0, WIDTH, DEPTH):
            acc = _dot(hidden.load([row, k]), weight.load([col, k]), acc)
    else:
        x_row = row + tl.arange(0, ROWS)
        w_row = col + tl.arange(0, COLS)
        depth = tl.arange(0, DEPTH)
        x_ptr = hidden + x_row[:, None].to(tl.int64) * WIDTH + depth[None, :]
        w_ptr = weight + w_row[:, None].to(tl.int64) * WIDTH + depth[None, :]
        for k in range(0, WIDTH, DEPTH):
            in_width = depth < WIDTH - k
            x = tl.load(x_ptr + k, mask=(x_row < rows)[:, None] & in_width[None, :], other=0.0)
            w = tl.load(w_ptr + k, mask=(w_row < vocab)[:, None] & in_width[None, :], other=0.0)
            acc = _dot(x, w, acc)
    return acc


@triton.jit(do_not_specialize=["rows", "vocab"])
def target_logit_kernel(hidden, weight, targets, scale, out, rows, vocab, WIDTH: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """out[R] float32 = hidden[r] . weight[targets[r]] * scale[r]; NaN for a target outside the vocabulary, whose row is not read."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=0)
    valid = inside & (target >= 0) & (target < vocab)
    depth = tl.arange(0, DEPTH)
    x_ptr = hidden + row[:, None].to(tl.int64) * WIDTH + depth[None, :]
    w_ptr = weight + target[:, None].to(tl.int64) * WIDTH + depth[None, :]
    acc = tl.zeros((ROWS, DEPTH), tl.float32)
    for k in range(0, WIDTH, DEPTH):
        mask = valid[:, None] & (depth < WIDTH - k)[None, :]
        acc += tl.load(x_ptr + k, mask=mask, other=0.0).to(tl.float32) * tl.load(w_ptr + k, mask=mask, other=0.0).to(tl.float32)
    logit = tl.sum(acc, 1) * tl.load(scale + row, mask=inside, other=0.0)
    tl.store(out + row, tl.where(valid, logit, float("nan")), mask=inside)


@triton.jit(do_not_specialize=["rows", "vocab"])
def exponentials_kernel(
    hidden, weight, targets, scale, anchor, exponentials, partials, rows, vocab,
    WIDTH: tl.constexpr, PITCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, STORE: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """e[r, v] = exp2(z - anchor[r]) for every v but the target, for which it is 0.

    partials[0, column tile, r] = sum over the tile of e; with ENTROPY partials[1, ...] = sum of e * (z - anchor).
    STORE writes e to exponentials[R, PITCH].
    """
    row_tile, col_tile = _tile(rows, vocab, ROWS, COLS, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    col = col_tile * COLS + tl.arange(0, COLS)
    inside = row < rows
    acc = _products(hidden, weight, row_tile * ROWS, col_tile * COLS, rows, vocab, WIDTH, ROWS, COLS, DEPTH, TMA)
    z = acc * tl.load(scale + row, mask=inside, other=0.0)[:, None] - tl.load(anchor + row, mask=inside, other=0.0)[:, None]
    target = tl.load(targets + row, mask=inside, other=0)
    others = (col < vocab)[None, :] & (col[None, :] != target[:, None])
    z = tl.where(others, z, TAKEN_OUT)
    e = tl.exp2(z)
    partial = partials + col_tile.to(tl.int64) * rows + row
    plane = tl.cdiv(vocab, COLS).to(tl.int64) * rows
    tl.store(partial, tl.sum(e, 1), mask=inside)
    if ENTROPY:
        tl.store(partial + plane, tl.sum(e * z, 1), mask=inside)
    if STORE:
        place = exponentials + row[:, None].to(tl.int64) * PITCH + col[None, :]
        tl.store(place, _round_to(e, exponentials.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["rows", "tiles"])
def sum_partials_kernel(partials, sums, rows, tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    """sums[plane, r] = partials[plane, tile, r] added over the tiles, in one order whatever the batch; grid (rows / ROWS, planes).

    A library's sum would split the additions by the number of rows, and a row would get other last bits in another batch.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    plane = tl.program_id(1).to(tl.int64)
    inside = row < rows
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        place = (plane * tiles + tile[:, None]) * rows + row[None, :]
        total += tl.sum(tl.load(partials + place, mask=(tile < tiles)[:, None] & inside[None, :], other=0.0), 0)
    tl.store(sums + plane * rows + row, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "vocab"])
def rescue_kernel(
    hidden, weight, targets, scale, anchor, overflowed, exponentials, sums, rows, vocab,
    WIDTH: tl.constexpr, PITCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, STORE: tl.constexpr,
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """Does the rows that int8 overflowed[R] marks again, anchored at their largest logit, and touches no other.

    Writes anchor[r], sums[plane, r] and with STORE exponentials[r, :], all as `exponentials_kernel` means them.
    One program walks the whole vocabulary twice; a program without a marked row walks nothing.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    marked = tl.load(overflowed + row, mask=row < rows, other=0) != 0
    first = tl.program_id(0) * ROWS
    end = tl.where(tl.max(marked.to(tl.int32), 0) != 0, vocab, 0)
    row_scale = tl.load(scale + row, mask=marked, other=0.0)[:, None]
    target = tl.load(targets + row, mask=marked, other=0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, end, COLS):
        z = _products(hidden, weight, first, start, rows, vocab, WIDTH, ROWS, COLS, DEPTH, False) * row_scale
        top = tl.maximum(top, tl.max(tl.where((start + tl.arange(0, COLS) < vocab)[None, :], z, float("-inf")), 1))
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    for start in range(0, end, COLS):
        col = start + tl.arange(0, COLS)
        z = _products(hidden, weight, first, start, rows, vocab, WIDTH, ROWS, COLS, DEPTH, False) * row_scale - top[:, None]
        z = tl.where((col < vocab)[None, :] & (col[None, :] != target[:, None]), z, TAKEN_OUT)
        e = tl.exp2(z)
        total += tl.sum(e, 1)
        if ENTROPY:
            weighted += tl.sum(e * z, 1)
        if STORE:
            place = exponentials + row[:, None].to(tl.int64) * PITCH + col[None, :]
            tl.store(place, _round_to(e, exponentials.dtype.element_ty), mask=marked[:, None])
    tl.store(anchor + row, top, mask=marked)
    tl.store(sums + row, total, mask=marked)
    if ENTROPY:
        tl.store(sums + rows + row, weighted, mask=marked)


@triton.jit(do_not_specialize=["rows", "vocab"])
def logit_gradient_kernel(
    hidden, weight, targets, scale, log_total, slope, entropy_slope, gradient, rows, vocab,
    WIDTH: tl.constexpr, PITCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """gradient[R, PITCH] = p * (slope - entropy_slope * log2 p) with p = exp2(z - log_total); 0 at the target and from V on.

    `entropy_slope` is None, or [R] like the other vectors.
    """
    row_tile, col_tile = _tile(rows, vocab, ROWS, COLS, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    col = col_tile * COLS + tl.arange(0, COLS)
    inside = row < rows
    acc = _products(hidden, weight, row_tile * ROWS, col_tile * COLS, rows, vocab, WIDTH, ROWS, COLS, DEPTH, TMA)
    log_p = acc * tl.load(scale + row, mask=inside, other=0.0)[:, None] - tl.load(log_total + row, mask=inside, other=0.0)[:, None]
    rate = tl.load(slope + row, mask=inside, other=0.0)[:, None]
    if entropy_slope is not None:
        rate = rate - tl.load(entropy_slope + row, mask=inside, other=0.0)[:, None] * log_p
    target = tl.load(targets + row, mask=inside, other=-1)
    others = (col < vocab)[None, :] & (col[None, :] != target[:, None])
    value = tl.where(others, tl.exp2(log_p) * rate, 0.0)
    place = gradient + row[:, None].to(tl.int64) * PITCH + col[None, :]
    tl.store(place, _round_to(value, gradient.dtype.element_ty), mask=inside[:, None])
