"""What every rank sampled, brought to all; and who learns from which of it: shares of equal cost, which each rank works out alone."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace

from bcr.learner.off_policy import Share
from bcr.learner.packs import Example
from bcr.model import DecoderConfig
from bcr.parallel.ranks import Ranks
from bcr.tasks.judging import Judged


def balanced(costs: Sequence[float], parts: int) -> list[int]:
    """The part of each item, from 0, such that the parts' sums of costs are nearly equal. A pure function of its arguments.

    Largest differencing (Karmarkar and Karp 1982, for several parts): the sums differ by no more than the largest cost, and mostly by much
    less.

    >>> balanced([8, 7, 6, 5, 4], 2)
    [1, 0, 1, 0, 0]
    """
    if parts == 1:
        return [0] * len(costs)
    # Each entry is a partial division: `sums` in falling order, with the items of each; the most uneven is merged first.
    entries: list[tuple[float, int, list[tuple[float, list[int]]]]] = [
        (-cost, index, [(cost, [index])] + [(0.0, list[int]())] * (parts - 1)) for index, cost in enumerate(costs)
    ]
    heapq.heapify(entries)
    while len(entries) > 1:
        _, first, left = heapq.heappop(entries)
        _, second, right = heapq.heappop(entries)
        merged = [(a + b, ours + theirs) for (a, ours), (b, theirs) in zip(left, reversed(right), strict=True)]
        merged.sort(key=lambda part: (-part[0], part[1]))
        heapq.heappush(entries, (merged[-1][0] - merged[0][0], min(first, second), merged))
    part_of = [0] * len(costs)
    for number, (_, items) in enumerate(entries[0][2] if entries else []):
        for item in items:
            part_of[item] = number
    return part_of


def learning_cost(config: DecoderConfig, prompt: int, completions: Sequence[int]) -> float:
    """Multiplications of a forward pass over a prompt of so many tokens and the completions that share it: linear in the places for the
    weights and in the completions' tokens for the head; for attention each place with what precedes it.

    The backward pass is twice as much of all, so shares that are equal in this are equal in all.
    """
    hidden, head, layers = config.hidden_size, config.head_dim, config.num_hidden_layers
    query, both = config.num_attention_heads * head, (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    dense = layers - (sparse := (layers - len(config.mlp_only_layers)) if config.num_experts else 0)
    mlp = 3 * hidden * (dense * config.intermediate_size + sparse * config.num_experts_per_tok * config.moe_intermediate_size)
    inputs = [tokens - 1 for tokens in completions]
    weights = layers * (hidden * both + query * hidden) + mlp
    attended = prompt**2 + sum(own**2 + 2 * prompt * own for own in inputs)  # twice the pairs of places; scores and values take one each
    return (prompt + sum(inputs)) * weights + sum(completions) * hidden * config.vocab_size + layers * query * attended


def own_shares(
    examples: Sequence[Example], updates: int, cost: Callable[[Sequence[Example]], float], ranks: Ranks, share_prompts: bool = True
) -> list[Share]:
    """What this rank learns from in each of the step's `updates`, of the examples of all ranks: no rank has to ask another.

    Each update takes its part of the step, which is in the order of the bundles; in it the ranks' sums of costs are nearly equal. `cost` is
    that of examples which share their prompts where they have the same.
    """
    shares = []
    for whole in Share.split(examples, updates):
        rank_of = rank_of_each(whole.examples, cost, ranks.size, share_prompts)
        own = [place for place, rank in enumerate(rank_of) if rank == ranks.rank]
        shares.append(Share([whole.examples[place] for place in own], [whole.indices[place] for place in own], whole.total))
    return shares


def rank_of_each(examples: Sequence[Example], cost: Callable[[Sequence[Example]], float], ranks: int, share_prompts: bool) -> list[int]:
    """The rank of each example. Those of one prompt together, or halved, and halved again, down to single examples: of these ways the one
    whose busiest rank has least to do, for a step lasts as long as that one; of equal ones that which parts least."""
    groups = dict[tuple[int, ...] | int, list[int]]()
    for place, example in enumerate(examples):
        groups.setdefault(tuple(example.prompt_ids) if share_prompts else place, []).append(place)
    items, tried = list(groups.values()), list[tuple[float, list[int]]]()
    while True:
        costs = [cost([examples[place] for place in item]) for item in items]
        part_of = balanced(costs, ranks)
        sums = [0.0] * ranks
        rank_of = [0] * len(examples)
        for item, price, part in zip(items, costs, part_of, strict=True):
            sums[part] += price
            for place in item:
                rank_of[place] = part
        tried.append((max(sums), rank_of))
        if ranks == 1 or all(len(item) < 2 for item in items):
            return min(tried, key=lambda way: way[0])[1]
        items = [half for item in items for half in (item[::2], item[1::2]) if half]


def on_every_rank(places: Sequence[int], groups: Sequence[list[Judged]], ranks: Ranks) -> list[list[Judged]]:
    """The judged groups of all ranks, on all of them, in the order of their places among the step's.

    A token takes 8 bytes on its way: a step of 1,000 rollouts of 4,000 tokens is 32 MB.
    """
    if ranks.size == 1:
        return list(groups)
    parcel = [(place, [packed(judged) for judged in group]) for place, group in zip(places, groups, strict=True)]
    found = sorted((one for part in ranks.gather(parcel) for one in part), key=lambda one: one[0])
    return [[unpacked(judged) for judged in group] for _, group in found]


def packed(judged: Judged) -> Judged:
    """With arrays in place of the rollout's lists, which pickle into 4 bytes a number; log-probs are float32 already."""
    rollout = judged.rollout
    return replace(judged, rollout=replace(rollout, token_ids=array("i", rollout.token_ids), logprobs=array("f", rollout.logprobs)))  # type: ignore[arg-type]


def unpacked(judged: Judged) -> Judged:
    rollout = judged.rollout
    return replace(judged, rollout=replace(rollout, token_ids=list(rollout.token_ids), logprobs=list(rollout.logprobs)))
