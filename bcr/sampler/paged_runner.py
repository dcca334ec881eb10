"""A step of the paged path: forks, the chunks of prompts, then one token for every row, enqueued without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bcr.model import Decoder
from bcr.sampler.batch import upload
from bcr.sampler.graphs import Graphs, Work, most_rows, padded_rows
from bcr.sampler.kv_cache import KVCache
from bcr.sampler.paged import PagedAttention, Way, chunk_inputs
from bcr.sampler.rows import Rows
from bcr.sampler.runner import Step
from bcr.sampler.sampling import SamplingParams, keyed_bits, sample
from bcr.sampler.scheduler import Chunk, Plan
from bcr_kernels import linear_sample

STOPS = 16  # the buffer of stop tokens holds a multiple of so many
LEAST_SPAN = 512  # positions: block tables are passed on in widths of 512, 1024, 2048, ... positions


class PagedRunner:
    """runner(plan) -> Step. Buffers and graphs outlive a call of `generate`; `begin` makes them ready for the next.

    Tokens, positions, block tables, stop checks and log-probs live on the device. A row that ended there is inert from the next step on,
    whether the host has read of it or not. Prompts go through the model in a pass of their own beside the graph of the decoding rows.
    `fused`: `linear_sample` chooses tokens by Gumbel-max without logits in memory; False: `sample`, from logits, as on a CPU and for cut
    distributions. `padded` False runs exactly as many rows as there are. `fixed_tokens`: every pass over prompts has so many tokens and
    every pass over decoding rows as many rows as there can be, idle ones included, so that no matrix product changes its shape.
    `with_logprob` False leaves the log-probs at 0, to see what they cost.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        max_rows: int,
        *,
        way: Way,
        capture: Callable[[Work], Work],
        fused: bool = True,
        padded: bool = True,
        fixed_tokens: int | None = None,
        with_logprob: bool = True,
    ) -> None:
        self.model, self.cache, self.way, self.fused, self.padded = model, cache, way, fused, padded
        self.fixed_tokens, self.with_logprob = fixed_tokens, with_logprob
        device = cache.device
        capacity = most_rows(max_rows)
        self.rows = Rows(capacity, -(-model.config.max_position_embeddings // cache.block_size), device)
        self.ends = torch.arange(capacity + 1, dtype=torch.int32, device=device)
        self.temperature = torch.ones(capacity, device=device)
        self.stops = torch.full((STOPS,), -1, dtype=torch.int64, device=device)
        self.out = torch.zeros(2 * capacity, dtype=torch.float64, device=device)
        self.graphs = Graphs(capture)
        self.places: list[int] = []
        self.params = SamplingParams(stop_token_ids=(0,), top_k=1)

    def begin(self, params: SamplingParams) -> None:
        """Nobody sits; tokens are drawn by `params` from now on."""
        self.rows.clear()
        self.params = params
        places = [weight.data_ptr() for weight in self.model.parameters()]
        if places != self.places:  # an update in place keeps them, a weight that moved does not
            self.places = places
            self.graphs.clear()
        self.temperature.fill_(params.temperature)
        stops = [*params.stop_token_ids, *[-1] * (-len(params.stop_token_ids) % STOPS)]
        if len(stops) != self.stops.shape[0]:
            self.stops = self.stops.new_empty(len(stops))
            self.graphs.clear()
        self.stops.copy_(upload(stops, torch.int64, self.cache.device))

    def __call__(self, plan: Plan) -> Step:
        assert not plan.moves, "blocks move only where each holds a whole request"
        self.cache.copy(plan.forks)
        if plan.chunks:
            self._prefill(plan.chunks)
        self.rows.settle(plan.live)
        count = len(plan.live)
        if not count:
            nothing = torch.zeros(0)
            return Step([], nothing, nothing)
        size = self.ends.shape[0] - 1 if self.fixed_tokens else padded_rows(count) if self.padded else count
        width = self._width(max(draft.cached for draft in plan.live))
        cut = (self.params.temperature, self.params.top_k, self.params.top_p, self.params.min_p)
        by_logits = self.params.truncated or not self.fused
        self.graphs.run((size, width, cut if by_logits else None), lambda: self._decode(size, width, by_logits))
        return self._read_back(count, size)

    def _prefill(self, chunks: Sequence[Chunk]) -> None:
        token_ids, positions, attention = chunk_inputs(chunks, self.cache, self.way, self.fixed_tokens)
        self.model(token_ids, positions, attention)

    def warm_up(self, tokens: int) -> None:
        """The largest steps there can be, all of it inert: compiles the kernels and shows how much memory a step needs."""
        self.model(*chunk_inputs([], self.cache, self.way, tokens))
        for by_logits in (False, True):
            self._decode(self.ends.shape[0] - 1, self.rows.table.shape[1], by_logits)

    def _decode(self, size: int, width: int, by_logits: bool) -> None:
        """One token for rows 0 .. size - 1, from and into the buffers; contexts lie in the first `width` blocks."""
        token, position, first, last, key, running = self.rows.fields(size)
        on, block_size = running > 0, self.cache.block_size
        block = self.rows.table[:size].gather(1, (position // block_size)[:, None]).squeeze(1)
        slots = torch.where(on, block * block_size + position % block_size, -1)
        lengths = torch.where(on, position + 1, 0).int()
        table = self.rows.table[:size, :width].contiguous()
        attention = PagedAttention(self.cache, slots, table, lengths, self.ends[: size + 1], 1, self.way)
        hidden = self.model(token, position, attention)
        if by_logits:
            tokens, logprobs = sample(self.model.logits(hidden), self.params, key, position - first)
        else:
            keys = keyed_bits(key, position - first)
            options: dict[str, Any] = {"with_logprob": self.with_logprob, "backend": self.way.backend}
            drawn = linear_sample(hidden, self.model.head_weight, keys, temperature=self.temperature[:size], **options)
            tokens, logprobs = drawn.token, torch.zeros_like(key) if drawn.logprob is None else drawn.logprob
        out = self.out[: 2 * size].view(2, size)
        out[0], out[1] = tokens, logprobs
        ended = (tokens[:, None] == self.stops).any(1) | (position >= last)
        token.copy_(torch.where(on, tokens, token))
        position.add_(running)
        running.copy_(on & ~ended)

    def _width(self, longest: int) -> int:
        """Blocks of the table to pass on, for contexts up to `longest`: few different ones, for each needs its graph."""
        span = LEAST_SPAN
        while span < longest:
            span *= 2
        return min(-(-span // self.cache.block_size), self.rows.table.shape[1])

    def _read_back(self, count: int, size: int) -> Step:
        """Tokens and log-probs on their way to the host, in one copy: float64 holds both exactly."""
        out = self.out[: 2 * size].view(2, size)
        host = HostCopy(out)
        return Step(self.rows.drafts, host.values[0, :count], host.values[1, :count], host.wait)


class HostCopy:
    """`values` of a tensor on the host: on CUDA they are there only after `wait()`, and nothing waits for them before."""

    def __init__(self, tensor: Tensor) -> None:
        self.values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self.values.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event() if tensor.is_cuda else None
        if self._event:
            self._event.record()

    def wait(self) -> None:
        if self._event:
            self._event.synchronize()
