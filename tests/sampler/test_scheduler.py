"""Whoever leaves in whatever order: every rollout is seated once, keeps its state and its cache, and live slots stay together."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.model import DecoderConfig
from bcr.records import Request
from bcr.sampler.kv_cache import ALIGN, SHORTEST, KVCache, round_up
from bcr.sampler.sampling import row_key
from bcr.sampler.scheduler import Group, Scheduler, Slots

CPU = torch.device("cpu")
LAYERS, HEADS, SIZE = 2, 2, 4
STOP = 9


def small_cache(slots: int, capacity: int) -> KVCache:
    config = DecoderConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=SIZE,
        max_position_embeddings=64,
    )
    return KVCache(config, slots, capacity, torch.float32, CPU)


def prefix_of(number: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values that tell whose they are: every entry is 100 * request + layer + 1, negative for values."""
    marks = [float(100 * number + layer + 1) for layer in range(LAYERS)]
    return [(torch.full((length, HEADS, SIZE), mark), torch.full((length, HEADS, SIZE), -mark)) for mark in marks]


REQUESTS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), min_size=1, max_size=8)  # (prompt length, cap on new tokens)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(REQUESTS, st.integers(1, 5), st.integers(1, 7), st.floats(0, 0.6), st.integers(0, 2**20))
def test_every_rollout_is_seated_once_and_keeps_what_is_its_own(
    sizes: list[tuple[int, int]], n: int, free: int, stop_rate: float, seed: int
) -> None:
    """The engine's loop with a die for a model: what a rollout records is checked against a ledger kept beside it."""
    rng = random.Random(seed)
    requests = [Request(str(number), [number % 9] * prompt, cap) for number, (prompt, cap) in enumerate(sizes)]
    numbers = {request.id: number for number, request in enumerate(requests)}
    scheduler, cache = Scheduler(requests, n), small_cache(free, 18)
    slots = Slots(free, max(request.max_new_tokens for request in requests), CPU)
    ledger: dict[tuple[str, int], list[int]] = {}
    seated: list[tuple[str, int]] = []
    finished: dict[tuple[str, int], list[int]] = {}
    while True:
        while admission := scheduler.next_admission(free - len(slots.owners)):
            group, count = admission
            assert 1 <= count <= free - len(slots.owners)
            first = len(slots.owners)
            group.prefix = group.prefix or prefix_of(numbers[group.request.id], len(group.request.prompt_ids) - 1)
            taken = slots.admit(group, count, seed)
            assert (taken.start, taken.stop) == (first, len(slots.owners)) == (first, first + count)
            cache.fill(taken, group.prefix)
            seated += names(slots)[first:]
        live = names(slots)
        if not live:
            break
        assert len(live) == free or sum(group.waiting for group in scheduler.groups) == 0  # nobody waits while a slot is free
        for slot, ((group, index), name) in enumerate(zip(slots.owners, live, strict=True)):
            check_slot(slots, cache, slot, group, index, ledger.setdefault(name, []), seed, numbers)
        tokens = [STOP if rng.random() < stop_rate else rng.randrange(STOP) for _ in live]
        done = slots.record(torch.tensor(tokens), torch.tensor([-token / 10 for token in tokens]), torch.tensor([STOP]))
        for name, token in zip(live, tokens, strict=True):
            ledger[name].append(token)
        caps = [group.request.max_new_tokens for group, _ in slots.owners]
        assert done == [slot for slot, name in enumerate(live) if tokens[slot] == STOP or len(ledger[name]) == caps[slot]]
        for slot in done:
            rollout = slots.rollout(slot, [STOP], policy_version=4)
            assert (rollout.request_id, rollout.policy_version) == (live[slot][0], 4)
            assert rollout.finish == ("stop" if tokens[slot] == STOP else "length")
            torch.testing.assert_close(torch.tensor(rollout.logprobs), torch.tensor(rollout.token_ids) / -10)
            assert live[slot] not in finished
            finished[live[slot]] = rollout.token_ids
        if done:
            cache.move(*slots.leave(done))
            stay = {name for slot, name in enumerate(live) if slot not in done}
            assert set(names(slots)) == stay
            assert len(slots.owners) == len(stay)
            assert not bool(slots.token[len(stay) :].any() or slots.position[len(stay) :].any())  # freed slots are inert
    everybody = [(request.id, index) for request in requests for index in range(n)]
    assert seated == everybody  # once each, first come, first served
    assert finished == ledger
    assert set(finished) == set(everybody)
    assert all(group.prefix is None for group in scheduler.groups)  # no prompt is kept longer than needed


def names(slots: Slots) -> list[tuple[str, int]]:
    return [(group.request.id, index) for group, index in slots.owners]


def check_slot(
    slots: Slots, cache: KVCache, slot: int, group: Group, index: int, tokens: list[int], seed: int, numbers: dict[str, int]
) -> None:
    """A live slot holds its owner's next input, position, count, cap, key, history and the prompt's keys and values."""
    prompt = group.request.prompt_ids
    state = [int(column[slot]) for column in (slots.token, slots.position, slots.generated, slots.limit, slots.key)]
    key = row_key(seed, group.request.id, index)
    assert state == [([*prompt, *tokens])[-1], len(prompt) + len(tokens) - 1, len(tokens), group.request.max_new_tokens, key]
    assert slots.tokens[slot, : len(tokens)].tolist() == tokens
    for layer, (key_mark, value_mark) in enumerate(prefix_of(numbers[group.request.id], len(prompt) - 1)):
        assert torch.equal(cache.keys[layer][slot, :, : len(prompt) - 1], key_mark.transpose(0, 1))
        assert torch.equal(cache.values[layer][slot, :, : len(prompt) - 1], value_mark.transpose(0, 1))


def test_fill_forks_a_prompt_into_its_slots_alone() -> None:
    cache, prefix = small_cache(6, 10), prefix_of(3, 5)
    prefix[1][0][2, 1, 3] = 77.0  # layer 1, key of place 2, head 1
    cache.fill(slice(2, 4), prefix)
    for slot in range(6):
        for layer in range(LAYERS):
            for cached, part, sign in ((cache.keys, 0, 1), (cache.values, 1, -1)):
                row = cached[layer][slot]
                if slot in (2, 3):
                    assert torch.equal(row[:, :5], prefix[layer][part].transpose(0, 1))
                    assert float(row[0, 0, 0]) == sign * (301.0 + layer)
                    assert not bool(row[:, 5:].any())
                else:
                    assert not bool(row.any())
    assert float(cache.keys[1][3, 1, 2, 3]) == 77.0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(2, 12), st.data())
def test_move_copies_whole_slots(slots: int, data: st.DataObject) -> None:
    cache = small_cache(slots, 4)
    for number, cached in enumerate((*cache.keys, *cache.values)):
        cached.copy_(torch.randn(cached.shape, generator=torch.Generator().manual_seed(number)))
    before = [cached.clone() for cached in (*cache.keys, *cache.values)]
    order = data.draw(st.permutations(range(slots)))
    moved = data.draw(st.integers(0, slots // 2))
    sources, targets = order[:moved], order[moved : 2 * moved]
    cache.move(torch.tensor(sources, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64))
    came_from = {**{slot: slot for slot in range(slots)}, **dict(zip(targets, sources, strict=True))}
    for cached, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert all(torch.equal(cached[slot], old[source]) for slot, source in came_from.items())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 40), st.integers(1, 300))
def test_a_cache_knows_what_it_holds(slots: int, capacity: int, other_slots: int, other_capacity: int) -> None:
    cache = small_cache(slots, capacity)
    assert cache.capacity % ALIGN == 0
    assert capacity <= cache.capacity < max(capacity, SHORTEST) + ALIGN
    assert cache.holds(slots, capacity)
    shape = (slots, HEADS, cache.capacity, SIZE)
    assert {tuple(cached.shape) for cached in (*cache.keys, *cache.values)} == {shape}
    assert cache.holds(other_slots, other_capacity) == (other_slots <= slots and other_capacity <= cache.capacity)


def test_bytes_per_slot_are_those_of_the_tensors(make_decoder) -> None:
    model = make_decoder(num_hidden_layers=3).to(torch.float64)
    cache = KVCache(model.config, 5, 33, torch.float64, CPU)
    held = sum(cached.numel() * cached.element_size() for cached in (*cache.keys, *cache.values))
    assert 5 * KVCache.bytes_per_slot(model, 33) == held


@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_round_up(number: int, multiple: int) -> None:
    found = round_up(number, multiple)
    assert found % multiple == 0
    assert number <= found < number + multiple
