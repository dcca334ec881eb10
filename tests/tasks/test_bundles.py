"""Bundles: N problems each, none skipped and none twice, sizes as asked, and a state of two cursors from which the stream goes on."""

import itertools
import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel

from bcr.records import Problem, Request
from bcr.tasks.arithmetic import ArithmeticDialect, ArithmeticProblems, build_tokenizer
from bcr.tasks.bundles import Budget, BundleStream, as_request, check_sizes, consecutive_bundles, longest_prompt, make_bundle, mixture
from bcr.tasks.text import TextDialect

calm = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

DIALECT = ArithmeticDialect(build_tokenizer())
PROBLEMS = ArithmeticProblems("train")
SHARED = Budget(total=120)
MIXTURES = st.dictionaries(st.integers(1, 6), st.sampled_from([0.5, 1.0, 3.0]), min_size=1)


def stream(sizes, seed=0, budget=SHARED):
    return BundleStream(PROBLEMS, DIALECT, sizes, budget, seed)


@calm
@given(MIXTURES, st.integers(0, 20), st.integers(0, 5))
def test_every_problem_is_asked_once_and_in_order(sizes, count, seed):
    bundles = stream(sizes, seed).take(count)
    asked = [problem for bundle in bundles for problem in bundle.problems]
    assert asked == [PROBLEMS[index] for index in range(len(asked))]
    assert {len(bundle.problems) for bundle in bundles} <= set(sizes)
    assert len({bundle.id for bundle in bundles}) == count
    for bundle in bundles:
        assert bundle.prompt_ids == DIALECT.prompt_ids(bundle.problems)


@calm
@given(MIXTURES, st.lists(st.integers(0, 6), max_size=5), st.integers(0, 5))
def test_it_goes_on_from_its_state(sizes, takes, seed):
    """However it is taken, and whether or not it is stopped and loaded in between: the same bundles."""
    whole = stream(sizes, seed).take(sum(takes))
    pieces, state = [], stream(sizes, seed).state_dict()
    for count in takes:
        resumed = stream(sizes, seed)
        resumed.load_state_dict(state)
        pieces += resumed.take(count)
        state = resumed.state_dict()
    assert pieces == whole
    assert state == {"bundles_made": len(whole), "problems_consumed": sum(len(bundle.problems) for bundle in whole)}


def test_sizes_come_in_the_shares_asked_for():
    sizes = Counter(len(bundle.problems) for bundle in stream({1: 1.0, 3: 2.0, 5: 1.0}).take(2000))
    assert set(sizes) == {1, 3, 5}
    assert sizes[3] / 2000 == pytest.approx(0.5, abs=0.06)
    assert sizes[1] / 2000 == pytest.approx(0.25, abs=0.05)


def test_one_size_is_that_size():
    assert {len(bundle.problems) for bundle in stream({3: 1.0}).take(20)} == {3}


def test_the_seed_changes_sizes_and_ids():
    mixture = {1: 1.0, 2: 1.0, 3: 1.0}
    one, other = stream(mixture, 0).take(30), stream(mixture, 1).take(30)
    assert [len(bundle.problems) for bundle in one] != [len(bundle.problems) for bundle in other]
    assert {bundle.id for bundle in one}.isdisjoint(bundle.id for bundle in other)


def test_the_budget_is_shared_or_grows_with_n():
    sizes = {1: 1.0, 4: 1.0}
    assert {(len(b.problems), b.budget) for b in stream(sizes).take(30)} == {(1, 120), (4, 120)}
    growing = stream(sizes, budget=Budget(per_problem=40)).take(30)
    assert {(len(b.problems), b.budget) for b in growing} == {(1, 40), (4, 160)}


@calm
@given(st.integers(1, 30), st.integers(1, 6))
def test_consecutive_bundles_leave_no_problem_out(count, size):
    problems = [PROBLEMS[index] for index in range(count)]
    bundles = consecutive_bundles(problems, size, DIALECT, Budget(per_problem=7), "held")
    assert [problem for bundle in bundles for problem in bundle.problems] == problems
    assert all(len(bundle.problems) == size for bundle in bundles[:-1])
    assert [bundle.budget for bundle in bundles] == [7 * len(bundle.problems) for bundle in bundles]
    assert len({bundle.id for bundle in bundles}) == len(bundles)


def test_bundles_of_different_sizes_have_different_ids():
    """The id keys the random numbers of the sampler: the same problem at N = 1 and at N = 2 is sampled independently."""
    problems = [PROBLEMS[index] for index in range(4)]
    ids = [bundle.id for size in (1, 2) for bundle in consecutive_bundles(problems, size, DIALECT, Budget(total=9), "held")]
    assert len(set(ids)) == 6


def test_a_request_asks_for_the_bundle():
    bundle = make_bundle("b", [PROBLEMS[0], PROBLEMS[1]], DIALECT, Budget(total=50))
    assert as_request(bundle) == Request("b", DIALECT.prompt_ids([PROBLEMS[0], PROBLEMS[1]]), 50)


@pytest.mark.parametrize(
    ("sizes", "budget", "sentence"),
    [
        ({}, Budget(total=9), "bundles.sizes is empty"),
        ({0: 1.0}, Budget(total=9), "bundles.sizes has N = 0; this dialect can put 1 to 6 problems in one prompt."),
        ({3: 1.0, 7: 1.0}, Budget(total=9), "bundles.sizes has N = 7; this dialect can put 1 to 6"),
        ({-1: 1.0}, Budget(total=9), "bundles.sizes has N = -1"),
        ({2: 0.0}, Budget(total=9), "bundles.shares gives N = 2 the share 0.0; shares must be positive."),
        ({2: float("nan")}, Budget(total=9), "bundles.shares gives N = 2 the share nan"),
        ({1: 1.0, 4: 1.0}, Budget(total=3), "bundles.budget is 3 tokens for N = 4 problems, less than one token for each."),
        ({1: 1.0}, Budget(total=0), "bundles.budget is 0 tokens for N = 1"),
    ],
)
def test_mixtures_that_cannot_be_trained_are_refused(sizes, budget, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        check_sizes(sizes, budget, DIALECT.max_problems)
    with pytest.raises(ValueError, match="bundles"):
        stream(sizes, budget=budget)


def test_a_budget_of_one_token_a_problem_is_allowed():
    check_sizes({4: 1.0}, Budget(total=4), 6)


@pytest.mark.parametrize("given_", [{}, {"total": 5, "per_problem": 5}])
def test_a_budget_is_given_exactly_once(given_):
    with pytest.raises(ValueError, match=r"bundles\.budget and bundles\.budget_per_problem: give exactly one"):
        Budget(**given_)


def test_a_budget_per_problem_has_at_least_one_token():
    with pytest.raises(ValueError, match=r"bundles\.budget_per_problem is 0; it must be at least 1"):
        Budget(per_problem=0)


def test_a_mixture_has_a_share_for_every_size():
    assert mixture([3]) == {3: 1.0}
    assert mixture([1, 3, 2]) == {1: 1.0, 3: 1.0, 2: 1.0}
    assert mixture([1, 3], [0.25, 2.0]) == {1: 0.25, 3: 2.0}
    with pytest.raises(ValueError, match=re.escape("bundles.sizes is [3, 3]; name every N once")):
        mixture([3, 3])
    for shares in ([], [1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match=rf"bundles\.shares has {len(shares)} numbers for the 2 of bundles\.sizes"):
            mixture([1, 2], shares)


def test_the_longest_prompt_is_measured_in_tokens():
    """Ten Chinese characters are thirty tokens where bytes are tokens: more than twenty letters. No bundle has a longer prompt."""
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    dialect = TextDialect(tokenizer, [0])
    problems = [Problem(str(k), question, "0", "test") for k, question in enumerate(("a" * 20, "漢" * 10, "b" * 20, "c" * 3, "é" * 12))]
    for size in (1, 2, 3, 5):
        every = itertools.combinations(problems, size)
        assert longest_prompt(problems, dialect, size) == max(len(dialect.prompt_ids(some)) for some in every)
