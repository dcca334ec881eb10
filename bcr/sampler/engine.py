"""`Sampler(model).generate(requests, params)`: continuous batching over the KV cache."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bcr.model import Decoder
from bcr.model.row_attention import readable, round_up
from bcr.records import Request, Rollout
from bcr.sampler.blocks import BlockAllocator
from bcr.sampler.checks import check_requests
from bcr.sampler.graphs import CudaCapture, eager, most_rows
from bcr.sampler.invariance import check_invariance, check_places
from bcr.sampler.kv_cache import KVCache
from bcr.sampler.memory import HOST_MB, Loan, block_count, cache_bytes, cache_share, find_saver, peak_of
from bcr.sampler.paged import Way
from bcr.sampler.paged_runner import PagedRunner
from bcr.sampler.runner import HostRunner, Step
from bcr.sampler.sampling import SamplingParams, row_key
from bcr.sampler.scheduler import Draft, Family, Plan, Scheduler
from bcr.sampler.stopping import Stopping

Runner = Callable[[Plan], Step]


class Sampler:
    """Samples from `model` in place: it shares the model's weights and never copies them.

    At most `max_batch` rollouts decode at once, fewer where `cache_mb` does not hold them (None: see `memory.py`; `learner_bytes` is what a
    learner in this process will take and keep on the device). `step_tokens` bounds the tokens of a step (None: 1024, on CUDA 8192, and at
    least twice `max_batch`): prompts are prefilled in chunks beside the decoding rows. Rows of a pass are filled up to a multiple of
    `row_block`, with which a row's numbers do not depend on the rest of the batch (contract 9; the thread count must stay the same too).
    `block_size` is the number of tokens in a block of the cache; None: on a CPU a block holds a whole request and is read in place.
    `lag`: how many steps the host runs ahead of the tokens it has read; None: 0 on a CPU, 1 on CUDA. `paged`: whether steps go through
    the paged kernels (`paged_runner.py`, which takes `paged_options`); None: on CUDA.
    `share_prompts` False prefills a group's prompt for each of its rollouts, to see what sharing is worth.
    On a CPU rollouts do not depend on their company to the last bit; the machine is asked whether that holds on it, and where not,
    `invariant` True raises ValueError, None warns, False is content. On the paged path True fills every pass up to one number of rows, so
    that nothing but preemption (which warns) makes a rollout depend on its company; None and False do not.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_batch: int = 256,
        row_block: int = 16,
        cache_mb: float | None = None,
        step_tokens: int | None = None,
        block_size: int | None = None,
        lag: int | None = None,
        invariant: bool | None = None,
        paged: bool | None = None,
        paged_options: Mapping[str, Any] | None = None,
        learner_bytes: int = 0,
        share_prompts: bool = True,
    ) -> None:
        if row_block < 8:
            raise ValueError(f"row_block is {row_block}; below 8 rows a matrix product takes another path and rows would differ.")
        for name, value in {"max_batch": max_batch, "block_size": 1 if block_size is None else block_size}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        on_cpu = model.embed_tokens.weight.device.type == "cpu"
        if step_tokens is None:
            step_tokens = max(1024 if on_cpu else 8192, 2 * max_batch)
        if step_tokens <= max_batch:
            raise ValueError(f"step_tokens is {step_tokens}; it must exceed max_batch = {max_batch}, or no prompt would ever be prefilled.")
        self.model, self.max_batch, self.row_block, self.cache_mb = model, max_batch, row_block, cache_mb
        self.on_cpu, self.learner_bytes, self.loan = on_cpu, learner_bytes, Loan(None if on_cpu else find_saver())
        self.paged = not on_cpu if paged is None else paged
        way = Way.of(model.embed_tokens.weight.device, model.embed_tokens.weight.dtype, model.config.head_dim)
        self.block_size = way.block_size if self.paged and block_size is None else block_size
        self.step_tokens, self.lag = step_tokens, (0 if on_cpu else 1) if lag is None else lag
        captured = not way.waits and model.config.num_experts == 0  # the choice of experts makes the host wait
        fixed = round_up(step_tokens, 16) + 16 if invariant else None  # some for the inert tokens of `chunk_inputs`
        self.paged_options = {"way": way, "capture": CudaCapture() if captured else eager, "fixed_tokens": fixed, **(paged_options or {})}
        self._paged_runner: PagedRunner | None = None
        self.policy_version = 0
        self.invariant, self._to_check = invariant, bool(invariant) if self.paged else invariant is not False
        self._affordable: int | None = None
        self.share_prompts = share_prompts
        self._cache: KVCache | None = None

    def on_weights_changed(self) -> None:
        """Call after every update of the weights: later rollouts carry the new policy version. No prefix outlives `generate`."""
        self.policy_version += 1

    @torch.inference_mode()
    def release_cache(self) -> None:
        """Give the cache's memory back for good; the next `generate` takes new memory, and captures its graphs anew."""
        if self._cache is not None:
            self.loan.take_back(self._cache.memory)
        self._cache = self._paged_runner = None

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        progress: Callable[[int, int], None] | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> list[list[Rollout]]:
        """`params.n` rollouts for each request, in the order of the requests.

        `progress(finished, total)` is called as rollouts finish; `decode` turns tokens into text where there are stop strings. Raises
        ValueError naming the request for an empty prompt, a token outside the vocabulary, a cap below 1, a sequence longer than the
        model's context, a repeated id, or a cache too small for one. After an interrupt the next call starts afresh.
        """
        check_requests(requests, self.model.config)
        if not requests:
            return []
        stopping = Stopping(params, decode)
        self._check_machine()
        drafts = [[Draft(request, k, row_key(params.seed, request.id, k)) for k in range(params.n)] for request in requests]
        cache = self._cache_for(requests, params.n)
        together = drafts if self.share_prompts else [[draft] for group in drafts for draft in group]
        families = [Family(group[0].request.prompt_ids, deque(group)) for group in together]
        allocator = BlockAllocator(cache.blocks, cache.block_size)
        limits = {"max_rows": self._rows(cache, params.n), "step_tokens": self.step_tokens}
        scheduler = Scheduler(families, allocator, **limits, in_place=not self.paged)
        runner, underway = self._runner(cache, params), deque[Step]()
        rollouts: dict[Draft, Rollout] = {}

        def collect(lag: int) -> None:
            """Read the tokens of all but the last `lag` steps; finished drafts become rollouts."""
            before = len(rollouts)
            while len(underway) > lag:
                step = underway.popleft()
                for draft, token, logprob in zip(step.drafts, *step.read(), strict=True):
                    if draft in rollouts:
                        continue  # it had ended when this step began
                    draft.token_ids.append(token)
                    draft.logprobs.append(logprob)
                    if finish := stopping(draft):
                        rollouts[draft] = Rollout(draft.request.id, draft.token_ids, draft.logprobs, finish, self.policy_version)
                        scheduler.finish(draft)
            if progress and len(rollouts) > before:
                progress(len(rollouts), len(requests) * params.n)

        while not scheduler.done:
            plan = scheduler.schedule(drain=lambda: collect(0))
            idle = not plan.live and not plan.chunks
            if not idle:
                underway.append(self._step(plan, runner))
            collect(0 if idle else self.lag)
        if self.paged and self.invariant and scheduler.preemptions:
            warnings.warn(f"{scheduler.preemptions} rollouts were preempted, which sampling.invariant does not cover.", stacklevel=2)
        if self.learner_bytes:
            self.loan.lend(cache.memory)
        return [[rollouts[draft] for draft in group] for group in drafts]

    def _step(self, plan: Plan, runner: Runner) -> Step:
        return runner(plan)

    def _runner(self, cache: KVCache, params: SamplingParams) -> Runner:
        if not self.paged:
            return HostRunner(self.model, cache, params, self.row_block)
        if self._paged_runner is None or self._paged_runner.cache is not cache:
            self._paged_runner = self._paged_runner_on(cache)
        self._paged_runner.begin(params)
        return self._paged_runner

    def _paged_runner_on(self, cache: KVCache) -> PagedRunner:
        return PagedRunner(self.model, cache, self.max_batch, **self.paged_options)

    def _check_machine(self) -> None:
        if self._to_check:
            sizes = (most_rows(self.max_batch), round_up(self.step_tokens, 16) + 16)
            complaint = check_places(self.model, sizes) if self.paged else check_invariance(self.model, self.row_block)
            if complaint and self.invariant:
                raise ValueError(f"sampling.invariant is true, but {complaint}")
            if complaint:
                warnings.warn(complaint, stacklevel=3)
            self._to_check = False

    def _rows(self, cache: KVCache, n: int) -> int:
        """How many rollouts may decode at once. A group's prompt keeps a block until its last rollout has begun."""
        return max(1, min(self.max_batch, cache.blocks - (1 if n > 1 else 0)))

    def _cache_for(self, requests: Sequence[Request], n: int) -> KVCache:
        """The cache of the last call where it serves, else a new one."""
        longest = max(requests, key=lambda request: len(request.prompt_ids) + request.max_new_tokens)
        capacity = len(longest.prompt_ids) + longest.max_new_tokens
        weight = self.model.embed_tokens.weight
        size = self.block_size or readable(capacity)
        spare = 1 if n > 1 else 0
        wanted = (min(len(requests) * n, self.max_batch) + spare) * -(-capacity // size)
        affordable, least = self._affordable_blocks(size), -(-capacity // size) + spare
        if affordable < least:
            measured = self.cache_mb is None and not self.on_cpu
            room = "what is free on the device (cache_mb: null)" if measured else f"cache_mb = {self.cache_mb or HOST_MB}"
            raise ValueError(
                f"request {longest.id!r} needs {capacity} cached tokens; {room} holds {affordable * size}, "
                f"and {least * size} are needed to run it."
            )
        blocks = min(wanted, affordable) if self.on_cpu else affordable  # on CUDA once for all: graphs know its address
        held = self._cache
        if held is not None:
            self.loan.take_back(held.memory)
        if held is None or held.blocks < blocks or (held.block_size < size if self.block_size is None else held.block_size != size):
            self.release_cache()  # give the old one back before taking the new one
            with self.loan.region():
                self._cache = held = KVCache(self.model.config, blocks, size, weight.dtype, weight.device, token_major=self.paged)
        return held

    def _affordable_blocks(self, size: int) -> int:
        """Blocks of `size` tokens that the cache may have."""
        config, weight = self.model.config, self.model.embed_tokens.weight
        bytes_per_block = KVCache.bytes_per_block(config, size, weight.dtype)
        if self.cache_mb is not None or self.on_cpu:
            return int((HOST_MB if self.cache_mb is None else self.cache_mb) * 2**20 // bytes_per_block)
        if self._affordable is None:
            trial = self._paged_runner_on(KVCache(config, 1, size, weight.dtype, weight.device, token_major=True))
            step = peak_of(lambda: trial.warm_up(self.step_tokens), weight.device)
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(weight.device)
            share = cache_share(self.learner_bytes, self.loan.saver is not None)
            room = cache_bytes(free, step, self.learner_bytes, share)
            self._affordable = block_count(room, bytes_per_block, self.max_batch, -(-config.max_position_embeddings // size))
        return self._affordable
