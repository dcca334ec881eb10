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


def learning_cost(config: DecoderConfig, length: int) -> float:
    """Multiplications of a forward pass over a sequence of `length` tokens: linear in it for the weights, quadratic for attention.

    The backward pass is twice as much of both, so shares that are equal in this are equal in all.
    """
    hidden, head, layers = config.hidden_size, config.head_dim, config.num_hidden_layers
    query, both = config.num_attention_heads * head, (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    dense = layers - (sparse := (layers - len(config.mlp_only_layers)) if config.num_experts else 0)
    mlp = 3 * hidden * (dense * config.intermediate_size + sparse * config.num_experts_per_tok * config.moe_intermediate_size)
    weights = layers * (hidden * both + query * hidden) + mlp + hidden * config.vocab_size
    return length * weights + layers * query * length**2  # scores and values: each half of length^2 * query


def own_shares(examples: Sequence[Example], updates: int, cost: Callable[[Example], float], ranks: Ranks) -> list[Share]:
    """What this rank learns from in each of the step's `updates`, of the examples of all ranks: no rank has to ask another.

    Each update takes its part of the step, which is in the order of the bundles; in it the ranks' sums of costs are nearly equal.
    """
    shares = []
    for whole in Share.split(examples, updates):
        rank_of = balanced([cost(example) for example in whole.examples], ranks.size)
        own = [place for place, rank in enumerate(rank_of) if rank == ranks.rank]
        shares.append(Share([whole.examples[place] for place in own], [whole.indices[place] for place in own], whole.total))
    return shares


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
