"""Plain PyTorch meaning of every operation: first in full, as an oracle, then in chunks, as the CPU path.

T tokens, H hidden, V vocabulary, R the rows of a chunk. tau is the temperature. For each token, with z = hidden @ weight.T / tau:

    logsumexp = log sum_v exp(z_v)      logprob = z_target - logsumexp      entropy = logsumexp - sum_v p_v z_v,   p = exp(z - logsumexp)

The chunked forms hold one block of logits at a time. They are exact in the sense that logits are never rounded below float32.
Their blocks run over the vocabulary too, so that a bfloat16 weight is widened a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bcr_kernels._checks import IGNORED
from bcr_kernels._matmul import compute_dtype, exact_float32, matmul, matmul_add_, wide
from bcr_kernels.policy_loss import LossRule, Metrics, policy_loss

FORWARD_ELEMENTS = 1 << 23  # logits in memory at a time in the forward: 32 MiB of float32
POLICY_ELEMENTS = 1 << 25  # in the policy loss, which keeps whole rows: 128 MiB of float32
FORWARD_ROWS = 1024
VOCAB_BLOCK = 8192
FEWEST_ROWS = 16  # of a product with the weight on a CPU: of fewer, a row has other bits, the more so on several threads
TAKEN_OUT = -1e30  # a logit whose exponential is 0, finite so that 0 * logit is 0


class RowStatistics(NamedTuple):
    """What the rows of a chunk are reduced to; each [R] in the compute dtype. `entropy` is None unless asked for."""

    logprob: Tensor
    entropy: Tensor | None
    logsumexp: Tensor


class PolicyGradients(NamedTuple):
    """logprob and entropy [N]; hidden[N, H] and weight[V, H] gradients in the compute dtype, None where not asked for."""

    logprob: Tensor
    entropy: Tensor | None
    hidden: Tensor | None
    weight: Tensor | None


# ---- in full: the oracle ------------------------------------------------------------------------------------------------------


def materialised_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor = 1.0) -> RowStatistics:
    """The definition, on [T, V] logits under autograd; entropy always. Rows with target -100 are 0."""
    tau = temperature.to(compute_dtype(hidden)).unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    logits = torch.mm(wide(hidden), wide(weight).t()) / tau
    logsumexp = logits.logsumexp(1)
    counted = targets != IGNORED
    target_logits = logits.gather(1, targets.clamp(min=0).long().unsqueeze(1)).squeeze(1)
    entropy = logsumexp - (torch.softmax(logits, 1) * logits).sum(1)
    zero = logsumexp.new_zeros(())
    return RowStatistics(
        torch.where(counted, target_logits - logsumexp, zero), torch.where(counted, entropy, zero), torch.where(counted, logsumexp, zero)
    )


def materialised_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    old_logprobs: Tensor,
    segment_ids: Tensor,
    advantages: Tensor,
    weights: Tensor,
    rule: LossRule,
    temperature: float | Tensor = 1.0,
    behaviour_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The loss of `linear_policy_loss` on [T, V] logits under autograd."""
    logprob = materialised_logprob(hidden, weight, targets, temperature).logprob
    counted = (targets != IGNORED) & (segment_ids >= 0)
    table = torch.cat([advantages, advantages.new_zeros(1)])  # id -1 reads the appended zero
    loss, metrics = policy_loss(
        logprob,
        old_logprobs,
        table[segment_ids.long()],
        torch.where(counted, weights, 0.0),
        rule,
        behaviour_logprobs=behaviour_logprobs,
        reference_logprobs=reference_logprobs,
    )
    return loss.sum(), metrics


# ---- in chunks: the CPU path --------------------------------------------------------------------------------------------------


def row_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, inv_temperature: Tensor, with_entropy: bool) -> RowStatistics:
    """hidden[N, H], weight[V, H], targets[N] in [0, V), inv_temperature[N] in the compute dtype. No autograd."""
    rows = hidden.shape[0]
    parts = []
    with exact_float32(hidden.device):
        for chunk in spans(rows, FORWARD_ROWS):
            blocks = logit_blocks(hidden[chunk], weight, inv_temperature[chunk], rows)
            parts.append(block_statistics(blocks, targets[chunk], inv_temperature[chunk], with_entropy))
    return join(parts, inv_temperature, with_entropy)


def logit_blocks(hidden: Tensor, weight: Tensor, inv_temperature: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """(first id, logits[R, block]) of a chunk of R rows, block by block of the vocabulary; `rows` is the row count of the whole call."""
    for span in spans(weight.shape[0], max(1, FORWARD_ELEMENTS // max(1, min(rows, FORWARD_ROWS)))):
        yield span.start, _logits(hidden, weight[span], inv_temperature)


def block_statistics(blocks: Iterable[tuple[int, Tensor]], targets: Tensor, like: Tensor, with_entropy: bool) -> RowStatistics:
    """The statistics of the rows whose `logit_blocks` these are; the blocks are overwritten."""
    online = _OnlineSoftmax(targets, like, with_entropy)
    for first, logits in blocks:
        online.add(logits, first, scratch=logits)
    return online.statistics()


def logprob_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-prob [R] of targets[R] under logits[R, V] that are there already, temperature and all, in the compute dtype.

    The same operations on the same blocks as in `policy_gradients`: equal logits give equal bits. `logits` is used up.
    """
    blocks = ((span.start, logits[:, span]) for span in spans(logits.shape[1], VOCAB_BLOCK))
    return block_statistics(blocks, targets, logits[:, 0], False).logprob


def logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    statistics: RowStatistics,
    grads: RowStatistics,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients (hidden[N, H], weight[V, H]) in the compute dtype from recomputed logits; None where `needs` says so.

    `grads` holds dloss/d(logprob, entropy, logsumexp), [N] each, `grads.entropy` None when it is zero. With H the entropy:
    dlogprob/dz_v = [v = target] - p_v,  dlogsumexp/dz_v = p_v,  dentropy/dz_v = -p_v (z_v - logsumexp + H).
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    hidden_grad, weight_grad = _gradient_buffers(hidden, weight, needs)
    block = max(1, FORWARD_ELEMENTS // max(1, min(rows, FORWARD_ROWS)))
    with exact_float32(hidden.device):
        for chunk in spans(rows, FORWARD_ROWS):
            scale = inv_temperature[chunk, None]
            scaled_hidden = wide(hidden[chunk]) * scale
            slope = (grads.logsumexp - grads.logprob)[chunk, None]
            at_target = target_slope(statistics, grads)[chunk]
            for span in spans(vocab, block):
                log_p = _logits(hidden[chunk], weight[span], inv_temperature[chunk])
                _take_target_out(log_p, targets[chunk], span.start, at_target)
                p = log_p.sub_(statistics.logsumexp[chunk, None]).exp()
                rate = slope
                if grads.entropy is not None:
                    assert statistics.entropy is not None
                    rate = slope - grads.entropy[chunk, None] * (log_p + statistics.entropy[chunk, None])
                _add_at_target(p.mul_(rate), targets[chunk], span.start, at_target)
                if hidden_grad is not None:
                    matmul_add_(hidden_grad[chunk], p * scale, wide(weight[span]))
                if weight_grad is not None:
                    matmul_add_(weight_grad[span], p.t(), scaled_hidden)
    return hidden_grad, weight_grad


def policy_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    inv_temperature: Tensor,
    logprob_gradient: Callable[[slice, Tensor], Tensor],
    with_entropy: bool,
    needs: tuple[bool, ...],
) -> PolicyGradients:
    """Forward and gradient at once: three products, not four, because the exponentials of a chunk of rows are kept until used.

    `logprob_gradient(rows: slice, logprob[R]) -> dloss/dlogprob[R]` is the loss rule. Rows and dtypes as in `row_statistics`.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    if not any(needs):
        logprob, entropy, _ = row_statistics(hidden, weight, targets, inv_temperature, with_entropy)
        return PolicyGradients(logprob, entropy, None, None)
    hidden_grad, weight_grad = _gradient_buffers(hidden, weight, needs)
    chunk_rows = max(1, min(rows, POLICY_ELEMENTS // vocab))
    kept = torch.empty((chunk_rows, vocab), dtype=inv_temperature.dtype, device=hidden.device)
    parts = []
    with exact_float32(hidden.device):
        for chunk in spans(rows, chunk_rows):
            x, tau_inv, target = hidden[chunk], inv_temperature[chunk], targets[chunk]
            logits = kept[: x.shape[0]]
            online = _OnlineSoftmax(target, tau_inv, with_entropy)
            for span in spans(vocab, VOCAB_BLOCK):
                logits[:, span] = _logits(x, weight[span], tau_inv)
                online.add(logits[:, span], span.start)
            parts.append(online.statistics())
            gradient = logprob_gradient(chunk, parts[-1].logprob)
            at_target = -gradient * torch.expm1(parts[-1].logprob)
            scaled_hidden = wide(x) * tau_inv[:, None]
            for span in spans(vocab, VOCAB_BLOCK):
                dlogits = logits[:, span].sub_(parts[-1].logsumexp[:, None]).exp_().mul_(-gradient[:, None])
                _add_at_target(dlogits, target, span.start, at_target)
                if weight_grad is not None:
                    matmul_add_(weight_grad[span], dlogits.t(), scaled_hidden)
                if hidden_grad is not None:
                    matmul_add_(hidden_grad[chunk], dlogits.mul_(tau_inv[:, None]), wide(weight[span]))
    joined = join(parts, inv_temperature, with_entropy)
    return PolicyGradients(joined.logprob, joined.entropy, hidden_grad, weight_grad)


class _OnlineSoftmax:
    """The statistics of rows whose logits arrive block by block.

    Kept over v != target: the maximum m, sum exp(z - m) and sum exp(z - m) (z - m). The target stands apart, so that a log-prob close
    to 0 keeps its relative precision: with d = m + log sum exp(z - m) - z_target, logprob = -log(1 + exp(d)).
    """

    def __init__(self, targets: Tensor, like: Tensor, with_entropy: bool) -> None:
        self.targets = targets
        self.maximum = torch.full_like(like, torch.finfo(like.dtype).min)
        self.total = torch.zeros_like(like)
        self.weighted = torch.zeros_like(like) if with_entropy else None
        self.target_logit = torch.zeros_like(like)

    def add(self, logits: Tensor, first: int, *, scratch: Tensor | None = None) -> None:
        """logits[R, B] of the vocabulary entries first .. first + B - 1; the target's is taken out. `scratch` may be `logits` itself."""
        self.target_logit = _take_target_out(logits, self.targets, first, self.target_logit)
        maximum = torch.maximum(self.maximum, logits.amax(1))
        drop = self.maximum - maximum
        shifted = torch.sub(logits, maximum[:, None], out=scratch)
        if self.weighted is None:
            self.total = self.total * drop.exp() + shifted.exp_().sum(1)
        else:
            exponentials = shifted.exp()
            self.weighted = (self.weighted + drop * self.total) * drop.exp() + shifted.mul_(exponentials).sum(1)
            self.total = self.total * drop.exp() + exponentials.sum(1)
        self.maximum = maximum

    def statistics(self) -> RowStatistics:
        lead = self.maximum + self.total.log() - self.target_logit
        # log(1 + exp(lead)) by functions that give an element the same bits wherever it stands, which `logaddexp` does not on a CPU
        logprob = -(lead.clamp(min=0) + torch.log1p((-lead.abs()).exp()))
        logsumexp = self.target_logit - logprob
        entropy = None
        if self.weighted is not None:
            below = logsumexp - self.maximum
            entropy = (-below).exp() * (below * self.total - self.weighted) - logprob.exp() * logprob
        return RowStatistics(logprob, entropy, logsumexp)


def _logits(hidden: Tensor, weight: Tensor, inv_temperature: Tensor) -> Tensor:
    """[R, B] in the compute dtype. On a CPU a row has the same bits among few others and among many."""
    rows = hidden.shape[0]
    missing = max(0, FEWEST_ROWS - rows) if hidden.device.type == "cpu" else 0
    return matmul(F.pad(hidden, (0, 0, 0, missing)), weight.t())[:rows].mul_(inv_temperature[:, None])


def _take_target_out(logits: Tensor, targets: Tensor, first: int, otherwise: Tensor) -> Tensor:
    """Each row's target logit if it lies in this block, else `otherwise`; in its place the block gets a logit whose exp is 0."""
    column, inside = _columns(targets, first, logits.shape[1])
    found = logits.gather(1, column[:, None]).squeeze(1)
    logits.scatter_(1, column[:, None], torch.where(inside, TAKEN_OUT, found)[:, None])
    return torch.where(inside, found, otherwise)


def _add_at_target(dlogits: Tensor, targets: Tensor, first: int, slope: Tensor) -> None:
    """dlogits[r, targets[r] - first] += slope[r] for the targets that lie in this block."""
    column, inside = _columns(targets, first, dlogits.shape[1])
    dlogits.scatter_add_(1, column[:, None], torch.where(inside, slope, 0.0)[:, None])


def _columns(targets: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """The column of each target in a block, any valid column for those outside, and which lie inside."""
    column = targets.long() - first
    inside = (column >= 0) & (column < width)
    return torch.where(inside, column, 0), inside


def target_slope(statistics: RowStatistics, grads: RowStatistics) -> Tensor:
    """dloss/dz at the target, [R]: 1 - p is taken from the log-prob, so that it does not cancel where p is close to 1."""
    probability = statistics.logprob.exp()
    slope = grads.logsumexp * probability - grads.logprob * torch.expm1(statistics.logprob)
    if grads.entropy is None or statistics.entropy is None:
        return slope
    return slope - grads.entropy * probability * (statistics.logprob + statistics.entropy)


def _gradient_buffers(hidden: Tensor, weight: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    dtype = compute_dtype(hidden)
    hidden_grad = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needs[0] else None
    weight_grad = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs[1] else None
    return hidden_grad, weight_grad


def join(parts: list[RowStatistics], like: Tensor, with_entropy: bool) -> RowStatistics:
    if not parts:
        empty = like.new_zeros(0)
        return RowStatistics(empty, empty.clone() if with_entropy else None, empty.clone())
    logprob, entropy, logsumexp = zip(*parts, strict=True)
    return RowStatistics(torch.cat(logprob), torch.cat(entropy) if with_entropy else None, torch.cat(logsumexp))


def spans(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
