"""Shares of equal cost: whole, the same for whoever works them out, and as even as rollouts that cannot be split allow."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.learner.off_policy import Share
from bcr.learner.packs import Example
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


@given(st.integers(2, 16), st.integers(8, 24), st.randoms(use_true_random=False), st.integers(200, 20_000))
@settings(max_examples=40, deadline=None)
def test_learning_is_balanced_within_five_percent(ranks: int, each: int, chance, budget: int) -> None:
    """From 8 rollouts a rank up, of a tenth of the budget to all of it."""
    prices = [learning_cost(CONFIG, 60 + chance.randint(budget // 10, budget)) for _ in range(ranks * each)]
    sums = loads(prices, ranks)
    assert max(sums) <= 1.05 * sum(sums) / ranks


def example(length: int, advantage: float) -> Example:
    return Example([1, 2], [7] * length, [-1.0] * length, [Segment(0, 0, length)], [advantage])


@given(
    st.lists(st.tuples(st.integers(1, 90), st.sampled_from([0.0, 1.0])), min_size=6, max_size=6),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3]),
)
def test_shares_make_up_the_step(rows: list[tuple[int, float]], size: int, updates: int) -> None:
    examples = [example(*row) for row in rows]
    alone = Share.split(examples, updates)
    cost: Callable[[Example], float] = lambda one: learning_cost(CONFIG, one.length) * one.has_signal  # noqa: E731
    by_rank = [own_shares(examples, updates, cost, Ranks("cpu", rank, size)) for rank in range(size)]
    for update, whole in enumerate(alone):
        shares = [shares[update] for shares in by_rank]
        assert all(share.total == whole.total for share in shares)
        assert all(share.examples[k] is examples[index] for share in shares for k, index in enumerate(share.indices))
        assert sorted(index for share in shares for index in share.indices) == list(whole.indices)


@pytest.mark.parametrize(
    "changes", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": (0,)}]
)
def test_the_cost_counts_the_weights_that_a_token_meets(changes: dict) -> None:
    """Each once, two of four experts, the router left out; and for attention two halves of a square of the query's width in each layer."""
    config = DecoderConfig(**{**SIZES, **changes})
    met = 0.0
    for name, weight in Decoder(config).named_parameters():
        if weight.dim() == 2 and not name.endswith(("embed_tokens.weight", "mlp.gate.weight")):
            met += weight.numel() / (2 if ".experts." in name else 1)
    for length in (16, 160):
        assert learning_cost(config, length) == length * met + 2 * 64 * length**2


def test_rollouts_travel_unchanged() -> None:
    rollout = Rollout("r", [151_000, 3], [-0.10000000149011612, -2.5], "stop", 4)
    judged = Judged(Bundle("b", (), [1], 9), rollout, (Segment(0, 0, 2),), (), 1)
    assert unpacked(packed(judged)) == judged
