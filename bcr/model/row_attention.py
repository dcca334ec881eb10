"""Attention whose numbers for one token are the same to the last bit wherever the token stands: the arithmetic of `invariant` mode.

On a CPU, a row of a matrix product has the same bits in every product of QUERY_ROWS rows and more, but not below; and a sum over the
context has the same bits however many zeros follow, as long as it is read in multiples of ALIGN places, at least SHORTEST of them and at
most SPAN at a time. So queries are padded to a multiple of QUERY_ROWS, keys are read by `readable`, and sums over more than SPAN places
are taken span by span. Decoding, prefill in chunks of any size and the training forward then agree exactly. `bcr.sampler.invariance`
asks the machine at hand whether it keeps these rules. (The fused CPU kernel does not: a row has other last bits on another thread.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_ROWS, ALIGN, SHORTEST, SPAN, TILE = 4, 16, 64, 192, 128


def attend(query: Tensor, key: Tensor, value: Tensor, unseen: Tensor) -> Tensor:
    """query[B,K,M,D] (times D^-0.5) over key[B,K,L,D], value[B,K,L,D] -> float32 [B,K,M,D].

    M is a multiple of QUERY_ROWS, L comes from `readable`; `unseen` (bool, broadcast to [B,K,M,U]) is what a query must not see of the last
    U places. Places that nobody wrote must be finite. The products are those of float32 whatever the dtype of the inputs.
    """
    batch, heads, rows, size = query.shape
    q, k, v = ((x if x.dtype == torch.float64 else x.float()).flatten(0, 1) for x in (query, key, value))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, rows, -1)
    scores[..., scores.shape[-1] - unseen.shape[-1] :].masked_fill_(unseen, float("-inf"))
    weights = scores.softmax(dim=-1).flatten(0, 1)
    length = weights.shape[2]
    if length <= SPAN:
        return torch.bmm(weights, v).view(batch, heads, rows, size)
    parts = [torch.bmm(weights[:, :, start : start + SPAN], v[:, start : start + SPAN]) for start in range(0, length, SPAN)]
    return sum(parts[1:], start=parts[0]).view(batch, heads, rows, size)


def attend_chunk(query: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor:
    """Causal attention of n consecutive tokens of one sequence: query[n,Q,D] at positions first .. first+n-1 over key[K,L,D] -> [n,Q,D].

    L = readable(first + n) or more places; what lies beyond a token's own position is not seen.
    """
    count, query_heads, size = query.shape
    key_heads, length = key.shape[0], readable(first + count)
    share = query_heads // key_heads
    grouped = query.view(count, key_heads, share, size).transpose(0, 1).reshape(1, key_heads, count * share, size)
    padded = F.pad(grouped * size**-0.5, (0, 0, 0, -count * share % (2 * QUERY_ROWS)))
    last = torch.arange(padded.shape[2], device=query.device).div_(share, rounding_mode="floor").add_(first)
    unseen = torch.arange(length, device=query.device) > last[:, None]
    out = attend(padded, key[None, :, :length], value[None, :, :length], unseen)[0, :, : count * share]
    return out.view(key_heads, count, share, size).transpose(0, 1).reshape(count, query_heads, size).to(query.dtype)


class InvariantAttention:
    """`PackedAttention`'s twin for training in `invariant` mode: attention(layer, query[T,Q,D], key[T,K,D], value[T,K,D]) -> [T,Q,D].

    Each sequence by itself, after its parent where it has one, in tiles of TILE queries. Tokens beyond the sequences (padding of T) are
    given zeros.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, parents: Sequence[int] | None = None) -> None:
        del device
        self.lengths = list(lengths)
        self.parents = [-1] * len(self.lengths) if parents is None else list(parents)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        del layer
        sizes = [*self.lengths, query.shape[0] - sum(self.lengths)]
        queries, keys, values = (x.split(sizes) for x in (query, key, value))
        parts = []
        for row, (parent, length) in enumerate(zip(self.parents, self.lengths, strict=True)):
            read = [parent, row] if parent >= 0 else [row]
            before = self.lengths[parent] if parent >= 0 else 0
            places = readable(before + length) - (before + length)
            own_keys, own_values = (F.pad(torch.cat([x[one] for one in read]).transpose(0, 1), (0, 0, 0, places)) for x in (keys, values))
            for first in range(0, length, TILE):
                parts.append(attend_chunk(queries[row][first : first + TILE], own_keys, own_values, before + first))
        parts.append(torch.zeros_like(queries[-1]))
        return torch.cat(parts)


def readable(length: int) -> int:
    """How many places attention reads to cover `length` of them."""
    return max(SHORTEST, round_up(length, ALIGN))


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
