"""`Sampler(model).generate(requests, params)`: continuous batching over the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from bcr.model import Decoder
from bcr.records import Request, Rollout
from bcr.sampler.kv_cache import KVCache, round_up
from bcr.sampler.runner import decode, prefill
from bcr.sampler.sampling import SamplingParams, sample
from bcr.sampler.scheduler import Scheduler, Slots


class Sampler:
    """Samples from `model` in place: it shares the model's weights and never copies them.

    Decoding runs in blocks of exactly `row_block` slots, idle ones included: every matrix product has the same shape whoever is
    in it, so a row's logits do not depend on the rest of the batch (contract 9; the thread count must stay the same too).
    `max_batch` slots are used at most, fewer where the cache of a slot is so large that `cache_mb` would not hold them.
    """

    def __init__(self, model: Decoder, *, max_batch: int = 256, row_block: int = 32, cache_mb: int = 2048) -> None:
        if row_block < 8:
            raise ValueError(f"row_block is {row_block}; below 8 rows a matrix product takes another path and rows would differ.")
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1.")
        self.model, self.max_batch, self.row_block, self.cache_mb = model, max_batch, row_block, cache_mb
        self.policy_version = 0
        self._cache: KVCache | None = None

    def on_weights_changed(self) -> None:
        """Call after every update of the weights: later rollouts carry the new policy version. No prefix outlives `generate`."""
        self.policy_version += 1

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], params: SamplingParams, progress: Callable[[int, int], None] | None = None
    ) -> list[list[Rollout]]:
        """`params.n` rollouts for each request, in the order of the requests.

        `progress(finished, total)` is called as rollouts finish. Raises ValueError naming the request for an empty prompt, a token
        outside the vocabulary, a cap below 1, a sequence longer than the model's context, a repeated id, or a cache too small for one.
        """
        self._check(requests)
        if not requests:
            return []
        scheduler = Scheduler(requests, params.n)
        cache = self._cache_for(requests, params.n)
        slots = Slots(cache.slots, max(request.max_new_tokens for request in requests), self.model.embed_tokens.weight.device)
        stop_token_ids = torch.tensor(params.stop_token_ids, device=slots.token.device)
        finished = 0
        while True:
            while admission := scheduler.next_admission(min(cache.slots, self.max_batch) - len(slots.owners)):
                group, count = admission
                if group.prefix is None:
                    group.prefix = prefill(self.model, group.request.prompt_ids[:-1])
                cache.fill(slots.admit(group, count, params.seed), group.prefix)
            live = len(slots.owners)
            if live == 0:
                return [[group.rollouts[sample] for sample in range(params.n)] for group in scheduler.groups]
            tokens, logprobs = sample(self._logits(slots, cache), params, slots.key[:live], slots.generated[:live])
            done = slots.record(tokens, logprobs, stop_token_ids)
            for slot in done:
                group, index = slots.owners[slot]
                group.rollouts[index] = slots.rollout(slot, params.stop_token_ids, self.policy_version)
            if done:
                cache.move(*slots.leave(done))
                finished += len(done)
                if progress:
                    progress(finished, len(requests) * params.n)

    def _logits(self, slots: Slots, cache: KVCache) -> torch.Tensor:
        """Logits [live,V] of the next token, block by block."""
        live = len(slots.owners)
        blocks = (slice(start, start + self.row_block) for start in range(0, live, self.row_block))
        return torch.cat([decode(self.model, cache, block, slots.token[block], slots.position[block]) for block in blocks])[:live]

    def _cache_for(self, requests: Sequence[Request], n: int) -> KVCache:
        """The cache of the last call where it is large enough, else a new one."""
        capacity = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
        affordable = self.cache_mb * 2**20 // KVCache.bytes_per_slot(self.model, capacity) // self.row_block * self.row_block
        if affordable == 0:
            longest = max(requests, key=lambda request: len(request.prompt_ids) + request.max_new_tokens)
            raise ValueError(
                f"request {longest.id!r} needs {capacity} cached tokens; cache_mb = {self.cache_mb} cannot hold {self.row_block} such rows."
            )
        slots = min(round_up(min(len(requests) * n, self.max_batch), self.row_block), affordable)
        if self._cache is None or not self._cache.holds(slots, capacity):
            self._cache = None  # give the old one back before taking the new one
            weight = self.model.embed_tokens.weight
            self._cache = KVCache(self.model.config, slots, capacity, weight.dtype, weight.device)
        return self._cache

    def _check(self, requests: Sequence[Request]) -> None:
        config, seen = self.model.config, set()
        for request in requests:
            if not request.prompt_ids:
                raise ValueError(f"request {request.id!r} has an empty prompt.")
            if request.max_new_tokens < 1:
                raise ValueError(f"request {request.id!r} has max_new_tokens = {request.max_new_tokens}; it must be at least 1.")
            if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < config.vocab_size:
                raise ValueError(f"request {request.id!r} has a token outside the vocabulary of {config.vocab_size}.")
            needed = len(request.prompt_ids) + request.max_new_tokens
            if needed > config.max_position_embeddings:
                raise ValueError(
                    f"request {request.id!r} needs {needed} positions ({len(request.prompt_ids)} for its prompt, "
                    f"{request.max_new_tokens} new); the model's context is {config.max_position_embeddings}."
                )
            if request.id in seen:
                raise ValueError(f"request {request.id!r} appears twice; ids key the random numbers and must differ.")
            seen.add(request.id)
