"""Whoever runs, waits or is thrown out: every draft finishes once, reads its own tokens alone, and no block is lost."""

import itertools
import random
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.model import DecoderConfig
from bcr.records import Request
from bcr.sampler import scheduler as scheduling
from bcr.sampler.blocks import BlockAllocator
from bcr.sampler.kv_cache import KVCache
from bcr.sampler.scheduler import Draft, Family, Plan, Scheduler

CPU = torch.device("cpu")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 5), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=60))
def test_blocks_are_counted_right_in_any_order_of_use(count: int, size: int, actions: list[tuple[int, int]]) -> None:
    allocator = BlockAllocator(count, size)
    held: list[tuple[list[int], int]] = []  # (blocks, length)
    for action, number in actions:
        free = allocator.free
        if action == 0:
            blocks = allocator.allocate(allocator.needed(number))
            assert (blocks is None) == (allocator.needed(number) > free)
            held += [] if blocks is None else [(blocks, number)]
        elif action == 1 and held:
            blocks, length = held[number % len(held)]
            fork = allocator.fork(blocks, length)
            assert (fork is None) == (length % size > 0 and free == 0)
            if fork:
                copy, pair = fork
                assert len(copy) == len(blocks)
                assert [a for a, b in zip(blocks, copy, strict=True) if a != b] == ([pair[0]] if pair else [])
                assert (pair is not None) == (length % size > 0)
                held.append((copy, length))
        elif action == 2 and held:
            allocator.release(held.pop(number % len(held))[0])
        elif action == 3 and held:
            assert allocator.packed == all(allocator.references[: count - free])
            if max(allocator.references) <= 1:
                allocator.pack()
                assert allocator.packed
                taken = itertools.count()
                held = [([next(taken) for _ in blocks], length) for blocks, length in held]
        references = [sum(block in blocks for blocks, _ in held) for block in range(count)]
        assert allocator.references == references
        assert allocator.free == references.count(0)
    for blocks, _ in held:
        allocator.release(blocks)
    assert allocator.free == count


def test_a_block_cannot_be_given_up_twice() -> None:
    allocator = BlockAllocator(2, 4)
    blocks = allocator.allocate(1)
    assert blocks is not None
    allocator.release(blocks)
    with pytest.raises(AssertionError, match="free already"):
        allocator.release(blocks)


class Paper:
    """A cache on paper: what is written at each place of each block, checked whenever a draft reads."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.places: list[list[object]] = [[None] * size for _ in range(blocks)]

    def write(self, blocks: list[int], position: int, token: object) -> None:
        self.places[blocks[position // self.size]][position % self.size] = token

    def read(self, blocks: list[int], length: int) -> list[object]:
        return [self.places[blocks[position // self.size]][position % self.size] for position in range(length)]

    def carry_out(self, plan: Plan, inputs: dict[Draft, object]) -> None:
        for copies in (plan.forks, plan.moves):
            assert len({target for _, target, _ in copies}) == len(copies)
            for target, found in [(target, self.places[source][:length]) for source, target, length in copies]:  # all at once
                self.places[target][: len(found)] = found
        for draft in plan.live:
            self.write(draft.blocks, draft.cached - 1, inputs[draft])
        for chunk in plan.chunks:
            for place, token in enumerate(chunk.token_ids):
                self.write(chunk.blocks, chunk.start + place, token)


REQUESTS = st.lists(st.tuples(st.integers(1, 14), st.integers(1, 12)), min_size=1, max_size=7)  # (prompt length, budget)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    REQUESTS,
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 30),
    st.integers(0, 9),
    st.integers(1, 9),
    st.integers(0, 2),
    st.randoms(),
)
def test_every_draft_finishes_once_on_its_own_tokens(
    sizes: list[tuple[int, int]], n: int, rows: int, size: int, spare: int, budget: int, lag: int, rng
) -> None:
    """The engine's loop with names for tokens and a die for the end. Blocks range from one token to a whole request."""
    requests = [Request(str(number), [100 * number + k for k in range(prompt)], new) for number, (prompt, new) in enumerate(sizes)]
    drafts = [[Draft(request, k, 0) for k in range(n)] for request in requests]
    capacity = max(prompt + new for prompt, new in sizes)
    blocks = -(-capacity // size) + (n > 1) + spare
    allocator, paper = BlockAllocator(blocks, size), Paper(blocks, size)
    families = [Family(request.prompt_ids, deque(group)) for request, group in zip(requests, drafts, strict=True)]
    scheduler = Scheduler(families, allocator, max_rows=rows, step_tokens=rows + budget)
    written: dict[Draft, list[object]] = {draft: [] for group in drafts for draft in group}  # what the device knows
    finished: list[Draft] = []
    underway: deque[list[tuple[Draft, object]]] = deque()
    ends = {draft: rng.randint(1, draft.request.max_new_tokens) for draft in written}

    def collect(keep: int) -> None:
        while len(underway) > keep:
            for draft, token in underway.popleft():
                if draft not in finished:
                    draft.token_ids.append(token)  # type: ignore[arg-type]
                    if len(draft.token_ids) == ends[draft]:
                        finished.append(draft)
                        scheduler.finish(draft)

    steps = 0
    while not scheduler.done:
        plan = scheduler.schedule(drain=lambda: collect(0))
        steps += 1
        assert steps < 20_000, "the scheduler stands still"
        if not plan.live and not plan.chunks:
            assert underway, "nothing to do and nothing to wait for"
            collect(0)
            continue
        assert len(plan.live) <= rows
        assert len(plan.live) + sum(len(chunk.token_ids) for chunk in plan.chunks) <= rows + budget
        paper.carry_out(plan, {draft: [*draft.request.prompt_ids, *written[draft]][draft.cached - 1] for draft in plan.live})
        for draft in plan.live:
            assert draft not in finished
            known = [*draft.request.prompt_ids, *written[draft]]
            assert draft.cached == len(known)
            assert paper.read(draft.blocks, draft.cached) == known
        step = [(draft, (draft.request.id, draft.index, len(written[draft]))) for draft in plan.live]
        for draft, token in step:
            written[draft].append(token)
        underway.append(step)
        collect(lag)
    assert sorted(map(id, finished)) == sorted(map(id, written))
    assert all(len(draft.token_ids) == ends[draft] for draft in written)
    assert allocator.free == blocks
    if -(-capacity // size) == 1:
        assert scheduler.preemptions == 0


def test_blocks_stay_together_and_in_the_order_of_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ends first: no gap below those that run, and contexts of like length beside each other."""
    rng, like = random.Random(0), 8
    monkeypatch.setattr(scheduling, "LIKE", like)
    requests = [Request(str(number), [0] * rng.randint(1, 60), rng.randint(1, 60)) for number in range(40)]
    families = [Family(request.prompt_ids, deque([Draft(request, 0, 0)])) for request in requests]
    scheduler, moved = Scheduler(families, BlockAllocator(40, 120), max_rows=40, step_tokens=10**6), 0
    while not scheduler.done:
        plan = scheduler.schedule(drain=lambda: None)
        moved += len(plan.moves)
        assert [draft.blocks for draft in plan.live] == [[block] for block in range(len(plan.live))]
        held = [draft.cached for draft in plan.live]
        assert all(right > left - like for row, right in enumerate(held) for left in held[:row])
        for draft in plan.live:
            draft.token_ids.append(0)
            if len(draft.token_ids) == draft.request.max_new_tokens:
                scheduler.finish(draft)
    assert moved > 40


def small_cache(blocks: int, size: int) -> KVCache:
    config = DecoderConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
    )
    return KVCache(config, blocks, size, torch.float32, CPU)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(2, 12), st.data())
def test_copy_copies_the_tokens_it_is_asked_for(blocks: int, data: st.DataObject) -> None:
    cache = small_cache(blocks, 4)
    for number, cached in enumerate((*cache.keys, *cache.values)):
        cached.copy_(torch.randn(cached.shape, generator=torch.Generator().manual_seed(number)))
    before = [cached.clone() for cached in (*cache.keys, *cache.values)]
    order, moved = data.draw(st.permutations(range(blocks))), data.draw(st.integers(0, blocks // 2))
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=moved, max_size=moved))
    copies = list(zip(order[:moved], order[moved : 2 * moved], lengths, strict=True))
    cache.copy(copies)
    for cached, old in zip((*cache.keys, *cache.values), before, strict=True):
        for source, target, length in copies:
            assert torch.equal(cached[target, :, :length], old[source, :, :length])
        untouched = [block for block in range(blocks) if block not in order[moved : 2 * moved]]
        assert torch.equal(cached[untouched], old[untouched])


def test_bytes_per_block_are_those_of_the_tensors(make_decoder) -> None:
    model = make_decoder(num_hidden_layers=3)
    cache = KVCache(model.config, 5, 33, torch.float64, CPU)
    held = sum(cached.numel() * cached.element_size() for cached in (*cache.keys, *cache.values))
    assert 5 * KVCache.bytes_per_block(model.config, 33, torch.float64) == held
