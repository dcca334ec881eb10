"""Shares of equal cost: whole, the same for whoever works them out, and as even as rollouts that cannot be split allow."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.learner.off_policy import Share
from bcr.learner.packs import Example, by_prompt
from bcr.model import Decoder, DecoderConfig
from bcr.parallel.exchange import balanced, learning_cost, own_shares, packed, unpacked
from bcr.parallel.ranks import Ranks
from bcr.records import Bundle, Rollout, Segment
from bcr.tasks.judging import Judged
from tests.conftest import SIZES

CONFIG = DecoderConfig(**SIZES)
costs = st.lists(st.integers(0, 1000), max_size=60)


def loads(prices: list, parts: int) -> list:
    sums = [0] * parts
    for price, part in zip(prices, balanced(prices, parts), strict=True):
        sums[part] += price
    return sums


@given(costs, st.integers(1, 9))
def test_the_sums_differ_by_no_more_than_one_item(prices: list[int], parts: int) -> None:
    """So within 5 % of the mean wherever no single item is more than that."""
    sums = loads(prices, parts)
    assert max(sums) - min(sums) <= max(prices, default=0)
    assert sum(sums) == sum(prices)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(2, 3))
@settings(max_examples=60)
def test_never_further_from_the_best_than_is_known_of_this_method(prices: list[int], parts: int) -> None:
    """Largest differencing is within 7/6 of the best for two parts and 4/3 - 1/(3(m-1)) for m (Fischetti and Martello 1987; Michiels et
    al. 2003). The best: all divisions tried."""
    best = min(
        max(sum(price for price, owner in zip(prices, owners, strict=True) if owner == part) for part in range(parts))
        for owners in itertools.product(range(parts), repeat=len(prices))
    )
    bound = 7 / 6 if parts == 2 else 4 / 3 - 1 / (3 * (parts - 1))
    assert max(loads(prices, parts)) <= bound * best + 1e-9


@given(st.integers(2, 16), st.integers(20, 40), st.randoms(use_true_random=False), st.integers(200, 20_000))
@settings(max_examples=40, deadline=None)
def test_learning_is_balanced_within_five_percent(ranks: int, each: int, chance, budget: int) -> None:
    """From 20 rollouts a rank up, of a tenth of the budget to all of it. (Of fewer, one that outweighs all others can be more.)"""
    prices = [learning_cost(CONFIG, 60, [chance.randint(budget // 10, budget)]) for _ in range(ranks * each)]
    sums = loads(prices, ranks)
    assert max(sums) <= 1.05 * sum(sums) / ranks


def example(length: int, advantage: float, prompt: int = 2) -> Example:
    return Example([1] * prompt, [7] * length, [-1.0] * length, [Segment(0, 0, length)], [advantage])


def cost(examples: Sequence[Example]) -> float:
    return sum(learning_cost(CONFIG, *one) for one in by_prompt(one for one in examples if one.has_signal))


@given(
    st.lists(st.tuples(st.integers(1, 90), st.sampled_from([0.0, 1.0])), min_size=6, max_size=6),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_shares_make_up_the_step(rows: list[tuple[int, float]], size: int, updates: int, share_prompts: bool) -> None:
    examples = [example(*row) for row in rows]
    alone = Share.split(examples, updates)
    by_rank = [own_shares(examples, updates, cost, Ranks("cpu", rank, size), share_prompts) for rank in range(size)]
    for update, whole in enumerate(alone):
        shares = [shares[update] for shares in by_rank]
        assert all(share.total == whole.total for share in shares)
        assert all(share.examples[k] is examples[index] for share in shares for k, index in enumerate(share.indices))
        assert sorted(index for share in shares for index in share.indices) == list(whole.indices)


@given(st.integers(2, 8), st.integers(1, 6), st.integers(2, 4000), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_busiest_rank_has_no_more_to_do_than_with_whole_groups_or_single_rollouts(ranks: int, each: int, prompt: int, chance) -> None:
    """8 rollouts a group; prompts counted where they stand."""
    groups = [[example(chance.randint(20, 200), 1.0, prompt + group) for _ in range(8)] for group in range(ranks * each)]
    examples = [one for group in groups for one in group]
    sums = [cost(own_shares(examples, 1, cost, Ranks("cpu", rank, ranks))[0].examples) for rank in range(ranks)]
    whole, alone = loads([cost(group) for group in groups], ranks), loads([cost([one]) for one in examples], ranks)
    assert max(sums) <= min(max(whole), max(alone))


def test_groups_are_not_parted_for_evenness_alone() -> None:
    """Whole, the ranks have 1120 and 1000 to do; halved, 1660 each."""
    examples = [replace(example(tokens, 1.0), prompt_ids=[tokens] * 600) for tokens in (50, 65) for _ in range(8)]

    def tokens(examples: Sequence[Example]) -> float:
        return sum(prompt + sum(completions) for prompt, completions in by_prompt(examples))

    shares = [own_shares(examples, 1, tokens, Ranks("cpu", rank, 2))[0].examples for rank in range(2)]
    assert sorted(map(tokens, shares)) == [1000, 1120]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_equal_groups_are_not_parted(ranks: int) -> None:
    examples = [replace(example(100, 1.0), prompt_ids=[group] * 50) for group in range(12) for _ in range(8)]
    for rank in range(ranks):
        (share,) = own_shares(examples, 1, cost, Ranks("cpu", rank, ranks))
        assert list(Counter(one.prompt_ids[0] for one in share.examples).values()) == [8] * (12 // ranks)


@pytest.mark.parametrize(
    "changes", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": (0,)}]
)
def test_the_cost_counts_the_weights_that_a_token_meets(changes: dict) -> None:
    """Each once for every place, the head for every target, two of four experts, the router left out; and for attention scores and values
    of each place with what precedes it, half a square and a rectangle, of the query's width in each layer."""
    config = DecoderConfig(**{**SIZES, **changes})
    met = 0.0
    for name, weight in Decoder(config).named_parameters():
        if weight.dim() == 2 and not name.endswith(("embed_tokens.weight", "mlp.gate.weight", "lm_head.weight")):
            met += weight.numel() / (2 if ".experts." in name else 1)
    head = config.vocab_size * config.hidden_size
    for prompt, first, second in ((16, 5, 1), (160, 9, 300)):
        attended = prompt**2 + (first - 1) ** 2 + (second - 1) ** 2 + 2 * prompt * (first + second - 2)
        expected = (prompt + first + second - 2) * met + (first + second) * head + 2 * 64 * attended
        assert learning_cost(config, prompt, [first, second]) == expected


def test_rollouts_travel_unchanged() -> None:
    rollout = Rollout("r", [151_000, 3], [-0.10000000149011612, -2.5], "stop", 4)
    judged = Judged(Bundle("b", (), [1], 9), rollout, (Segment(0, 0, 2),), (), 1)
    assert unpacked(packed(judged)) == judged
