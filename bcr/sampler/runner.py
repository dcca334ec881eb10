"""One step of the model on a CPU: a token for each decoding row and the chunks of prompts beside them, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bcr.model import Decoder
from bcr.model.decoder import Attention
from bcr.model.row_attention import round_up
from bcr.sampler.attention import CachedAttention
from bcr.sampler.batch import Batch
from bcr.sampler.kv_cache import KVCache
from bcr.sampler.sampling import SamplingParams, sample
from bcr.sampler.scheduler import Chunk, Draft, Plan


@dataclass(frozen=True)
class Step:
    """A step under way: tokens[R] and logprobs[R] of `drafts`, perhaps not yet computed. `arrived()` waits until they are."""

    drafts: list[Draft]
    tokens: Tensor
    logprobs: Tensor
    arrived: Callable[[], None] | None = None

    def read(self) -> tuple[list[int], list[float]]:
        if self.arrived:
            self.arrived()
        return self.tokens.long().tolist(), self.logprobs.tolist()


class HostRunner:
    """runner(plan) -> Step, for a cache whose blocks are read in place or gathered by torch. One serves one call of `generate`."""

    def __init__(self, model: Decoder, cache: KVCache, params: SamplingParams, row_block: int) -> None:
        self.model, self.cache, self.params, self.row_block = model, cache, params, row_block
        self.batch = Batch(cache.device)

    def __call__(self, plan: Plan) -> Step:
        batch = self.batch
        self.cache.copy(plan.forks)
        self.cache.copy(plan.moves)
        batch.settle(plan.live)
        logits = forward(self.model, batch, plan.chunks, CachedAttention(self.cache, batch, plan.chunks), self.row_block)
        tokens, logprobs = sample(logits, self.params, batch.key, batch.generated)
        batch.advance(tokens)
        return Step(plan.live, tokens, logprobs)


def forward(model: Decoder, batch: Batch, chunks: Sequence[Chunk], attention: Attention, row_block: int) -> Tensor:
    """Logits [R,V] of the batch's R rows. The tokens of the pass are filled up to a multiple of `row_block`: see `invariance.py`."""
    rows, device = len(batch.drafts), batch.device
    token_ids, positions = [batch.token], [batch.position]
    for chunk in chunks:
        token_ids.append(torch.tensor(chunk.token_ids, device=device))
        positions.append(torch.arange(chunk.start, chunk.start + len(chunk.token_ids), device=device))
    count = rows + sum(len(chunk.token_ids) for chunk in chunks)
    token_ids.append(torch.zeros(-count % row_block, dtype=torch.int64, device=device))
    positions.append(token_ids[-1])
    hidden = model(torch.cat(token_ids), torch.cat(positions), attention)
    return model.logits(hidden[: round_up(rows, row_block)])[:rows]
