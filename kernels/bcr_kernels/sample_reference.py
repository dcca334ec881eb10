"""The plain PyTorch meaning of `linear_sample`, and its CPU path: logits, noise, the lowest id of the largest sum."""

from __future__ import annotations

import torch
from torch import Tensor

from bcr_kernels import reference
from bcr_kernels._matmul import exact_float32
from bcr_kernels.noise import gumbel_noise
from bcr_kernels.reference import block_statistics, logit_blocks, spans


def sample(
    hidden: Tensor, weight: Tensor, keys: Tensor, inv_temperature: Tensor, noisy: Tensor | None, with_logprob: bool
) -> tuple[Tensor, Tensor | None]:
    """hidden[B, H], weight[V, H], keys[B], inv_temperature[B] in the compute dtype; noisy[B] is 1 where a row is sampled and 0 where it
    is greedy, None where all are greedy. Returns token[B] int64 and logprob[B].

    Logits are made in `row_statistics`' own blocks. Where a chunk's fit into memory they are kept for its log-prob, else made again: the
    bits are the same.
    """
    rows, vocab = hidden.shape[0], weight.shape[0]
    tokens = torch.zeros_like(keys)
    logprobs = torch.empty_like(inv_temperature)
    with exact_float32(hidden.device):
        for chunk in spans(rows, reference.FORWARD_ROWS):
            of_chunk = hidden[chunk], weight, inv_temperature[chunk]
            keep = with_logprob and (chunk.stop - chunk.start) * vocab <= reference.POLICY_ELEMENTS
            kept = []
            best = torch.full_like(inv_temperature[chunk], float("-inf"))
            for first, logits in logit_blocks(*of_chunk, rows):
                scores = logits
                if noisy is not None:
                    scores = gumbel_noise(keys[chunk], first, logits.shape[1], logits.dtype).mul_(noisy[chunk, None]).add_(logits)
                top, place = scores.max(1)  # the first of equal ones
                tokens[chunk] = torch.where(top > best, place + first, tokens[chunk])
                best = torch.maximum(best, top)
                if keep:
                    kept.append((first, logits))
            if with_logprob:
                blocks = kept if keep else logit_blocks(*of_chunk, rows)
                logprobs[chunk] = block_statistics(blocks, tokens[chunk], inv_temperature[chunk], False).logprob
    return tokens, logprobs if with_logprob else None
