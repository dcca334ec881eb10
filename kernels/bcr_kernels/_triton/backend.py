"""Launches the kernels: the same three functions as the chunked ones of `reference`, for tensors on CUDA (or under the interpreter).

The softmax is *anchored at the target*. With a the target's logit and S = sum over v != target of exp(z_v - a):

    logprob = -log1p(S)      logsumexp = a + log1p(S)      p_v = exp(z_v - a) / (1 + S)

so no running maximum is kept, nothing is rescaled, and a log-prob close to 0 keeps its relative precision. S overflows only if the
target is less likely than e^-88 (float32); such rows are marked on the device and done again, anchored at their maximum, by a kernel
that costs nothing where no row is marked.

For the policy loss the exponentials E[r, v] = exp(z_v - a) of a chunk are kept, 0 at the target. Then dloss/dlogits of a row, the
target apart, is f * E with one number f = -g / (1 + S) per row, and both gradients are plain products for the matrix library:

    hidden gradient = diag(f / tau) (E @ weight) + ...          weight gradient = E.T @ (diag(f / tau) hidden) + ...

The target's own term, g S / (1 + S), is the largest of its row. It is left out of the rounded matrix and added in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bcr_kernels._matmul import exact_float32, matmul, matmul_add_
from bcr_kernels._triton import kernels, tiles
from bcr_kernels._triton.tiles import Tile
from bcr_kernels.reference import PolicyGradients, RowStatistics, join, spans, target_slope

LN2, LOG2E = math.log(2), 1 / math.log(2)
FORWARD_ROWS = 8192  # bounds the partial sums of a forward: 20 MB per plane at V = 151,936
FORWARD_LIMIT, STORED_LIMIT = 2.0**120, 2.0**64  # a larger S is done again; kept exponentials get room for products with 1 / S


class _Anchored(NamedTuple):
    """A chunk's softmax in base 2, [R] each: with e_v = exp2(z_v - anchor), `others` is sum e_v and `weighted` sum e_v (z_v - anchor).

    Both sums leave the target out.
    """

    target_logit: Tensor
    anchor: Tensor
    others: Tensor
    weighted: Tensor | None

    def total(self) -> Tensor:
        return torch.exp2(self.target_logit - self.anchor) + self.others

    def statistics(self) -> RowStatistics:
        gap = self.target_logit - self.anchor  # 0, except in rescued rows
        total = self.total()
        log_total = total.log2()
        logprob = torch.where(gap == 0, -torch.log1p(self.others), (gap - log_total) * LN2)
        entropy = None
        if self.weighted is not None:
            entropy = (log_total - (self.weighted + torch.exp2(gap) * gap) / total) * LN2
        return RowStatistics(logprob, entropy, (self.anchor + log_total) * LN2)


def row_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, inv_temperature: Tensor, with_entropy: bool) -> RowStatistics:
    """See `reference.row_statistics`."""
    hidden, weight = readable(hidden), readable(weight)
    parts = [
        _anchored_softmax(hidden[chunk], weight, targets[chunk], inv_temperature[chunk], with_entropy, None).statistics()
        for chunk in spans(hidden.shape[0], FORWARD_ROWS)
    ]
    return join(parts, inv_temperature, with_entropy)


def logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    statistics: RowStatistics,
    grads: RowStatistics,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """See `reference.logprob_backward`."""
    hidden, weight = readable(hidden), readable(weight)
    buffers = _gradient_buffers(hidden, weight, needs)
    slope, entropy_slope = grads.logsumexp - grads.logprob, None
    if grads.entropy is not None:
        assert statistics.entropy is not None
        slope = slope - grads.entropy * statistics.entropy
        entropy_slope = grads.entropy * (LN2 * inv_temperature)
    at_target = target_slope(statistics, grads)
    vectors = (inv_temperature * LOG2E, statistics.logsumexp * LOG2E, slope * inv_temperature, entropy_slope)
    chunk_rows, kept = _chunk_buffer(hidden, weight)
    for chunk in spans(hidden.shape[0], chunk_rows):
        x, target, dlogits = hidden[chunk], targets[chunk], kept[: chunk.stop - chunk.start]
        of_chunk = (None if vector is None else vector[chunk].contiguous() for vector in vectors)
        launch_tiles(kernels.logit_gradient_kernel, tiles.tile_for(x), x, weight, target, *of_chunk, dlogits, PITCH=dlogits.shape[1])
        _add_gradients(buffers, chunk, x, weight, target, dlogits, None, (at_target * inv_temperature)[chunk])
    return buffers


def policy_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    logprob_gradient: Callable[[slice, Tensor], Tensor],
    with_entropy: bool,
    needs: tuple[bool, ...],
) -> PolicyGradients:
    """See `reference.policy_gradients`."""
    if not any(needs):
        logprob, entropy, _ = row_statistics(hidden, weight, targets, inv_temperature, with_entropy)
        return PolicyGradients(logprob, entropy, None, None)
    hidden, weight = readable(hidden), readable(weight)
    buffers = _gradient_buffers(hidden, weight, needs)
    chunk_rows, kept = _chunk_buffer(hidden, weight)
    parts = []
    for chunk in spans(hidden.shape[0], chunk_rows):
        x, target, exponentials = hidden[chunk], targets[chunk], kept[: chunk.stop - chunk.start]
        softmax = _anchored_softmax(x, weight, target, inv_temperature[chunk], with_entropy, exponentials)
        parts.append(softmax.statistics())
        factor = -logprob_gradient(chunk, parts[-1].logprob) * inv_temperature[chunk] / softmax.total()
        _add_gradients(buffers, chunk, x, weight, target, exponentials, factor, -factor * softmax.others)
    joined = join(parts, inv_temperature, with_entropy)
    return PolicyGradients(joined.logprob, joined.entropy, *buffers)


def _anchored_softmax(
    hidden: Tensor, weight: Tensor, targets: Tensor, inv_temperature: Tensor, with_entropy: bool, exponentials: Tensor | None
) -> _Anchored:
    """One chunk; with `exponentials` [R, PITCH] they are kept, 0 at the target and from V on."""
    rows, vocab, width = hidden.shape[0], *weight.shape
    scale = inv_temperature * LOG2E
    target_logit = torch.empty_like(scale)
    with torch.cuda.device_of(hidden):
        kernels.target_logit_kernel[(triton.cdiv(rows, tiles.TARGET_ROWS),)](
            hidden, weight, targets, scale, target_logit, rows, vocab, width, tiles.TARGET_ROWS, tiles.TARGET_DEPTH, num_warps=4
        )
    constants = {"STORE": exponentials is not None, "ENTROPY": with_entropy, "PITCH": 1 if exponentials is None else exponentials.shape[1]}
    stored = scale if exponentials is None else exponentials  # a pointer is needed, whether written through or not
    partials = scale.new_empty((1 + with_entropy, triton.cdiv(vocab, tiles.tile_for(hidden).cols), rows))
    tile = tiles.tile_for(hidden)
    launch_tiles(kernels.exponentials_kernel, tile, hidden, weight, targets, scale, target_logit, stored, partials, **constants)
    sums = _sum_partials(partials)

    anchor = target_logit.clone()
    overflowed = ~(sums[0] < (FORWARD_LIMIT if exponentials is None else STORED_LIMIT))
    tile = tiles.RESCUE_TILE if hidden.is_cuda else tiles.INTERPRETER_TILE
    with torch.cuda.device_of(hidden):
        kernels.rescue_kernel[(triton.cdiv(rows, tile.rows),)](
            hidden, weight, targets, scale, anchor, overflowed.to(torch.int8), stored, sums, rows, vocab,
            WIDTH=width, ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages, **constants,
        )  # fmt: skip
    return _Anchored(target_logit, anchor, sums[0], sums[1] if with_entropy else None)


def _sum_partials(partials: Tensor) -> Tensor:
    """[planes, tiles, R] added over the tiles: [planes, R]."""
    planes, col_tiles, rows = partials.shape
    sums = partials.new_empty((planes, rows))
    with torch.cuda.device_of(partials):
        kernels.sum_partials_kernel[(triton.cdiv(rows, tiles.SUM_ROWS), planes)](
            partials, sums, rows, col_tiles, tiles.SUM_ROWS, tiles.SUM_TILES, num_warps=4
        )
    return sums


def launch_tiles(kernel: Any, tile: Tile, hidden: Tensor, weight: Tensor, *arguments: Tensor | None, **constants: int) -> None:
    """One program per tile of logits. hidden[R, H] and weight[V, H] become TMA descriptors where the tile says so."""
    (rows, width), vocab = hidden.shape, weight.shape[0]
    operands = _descriptors(hidden, weight, tile) if tile.tma else (hidden, weight)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(vocab, tile.cols),)
    with torch.cuda.device_of(hidden):
        kernel[grid](
            *operands, *arguments, rows, vocab,
            WIDTH=width, ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, GROUP=tile.group, TMA=tile.tma,
            num_warps=tile.warps, num_stages=tile.stages, **constants,
        )  # fmt: skip


def readable(tensor: Tensor) -> Tensor:
    """Contiguous and beginning at a multiple of 16 bytes, as vector loads and TMA want it; copied only where it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _descriptors(hidden: Tensor, weight: Tensor, tile: Tile) -> tuple[TensorDescriptor, TensorDescriptor]:
    return (
        TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight, [tile.cols, tile.depth]),
    )


def _gradient_buffers(hidden: Tensor, weight: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    """float32; the hidden gradient is written chunk by chunk, the weight gradient accumulates over them."""
    hidden_grad = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if needs[0] else None
    weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs[1] else None
    return hidden_grad, weight_grad


def _chunk_buffer(hidden: Tensor, weight: Tensor) -> tuple[int, Tensor]:
    """How many rows a chunk has, and room for one value per logit of them in the dtype of the inputs."""
    pitch = triton.cdiv(weight.shape[0], (cols := tiles.tile_for(hidden).cols)) * cols
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 1
    rows = min(hidden.shape[0], tiles.chunk_rows(hidden.shape[1], pitch * hidden.element_size(), processors))
    return max(1, rows), torch.empty((rows, pitch), dtype=hidden.dtype, device=hidden.device)


def _add_gradients(
    buffers: tuple[Tensor | None, Tensor | None],
    chunk: slice,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dlogits: Tensor,
    factor: Tensor | None,
    at_target: Tensor,
) -> None:
    """Gradients of a chunk whose dloss/d(hidden @ weight.T) is diag(factor) dlogits[R, PITCH], and at_target[R] at the targets.

    `factor` None is 1. `index_put_` adds rows of one target in a fixed order, `index_add_` would not.
    """
    hidden_grad, weight_grad = buffers
    dlogits, targets, at_target = dlogits[:, : weight.shape[0]], targets.long(), at_target[:, None]
    with exact_float32(x.device):
        if hidden_grad is not None:
            product = matmul(dlogits, weight)
            product = product if factor is None else product.mul_(factor[:, None])
            hidden_grad[chunk] = product.addcmul_(weight[targets].float(), at_target)
        if weight_grad is not None:
            matmul_add_(weight_grad, dlogits.t(), x if factor is None else (x.float() * factor[:, None]).to(x.dtype))
            weight_grad.index_put_((targets,), x.float() * at_target, accumulate=True)
