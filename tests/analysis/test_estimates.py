"""Accuracy over samples and its intervals: against counting, and against what is known of the binomial."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcr.analysis.estimates import area_under_curve, interval, mean_at_k, mean_interval, paired_difference, pass_at_k

tables = st.integers(1, 6).flatmap(lambda k: st.lists(st.lists(st.sampled_from([0, 1]), min_size=k, max_size=k), min_size=1, max_size=5))


@given(tables, st.data())
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(table, data):
    k = data.draw(st.integers(1, len(table[0])))
    counted = [np.mean([any(row[i] for i in chosen) for chosen in itertools.combinations(range(len(row)), k)]) for row in table]
    assert pass_at_k(table, k) == pytest.approx(np.mean(counted))


@given(tables)
def test_pass_at_one_is_the_mean(table):
    assert pass_at_k(table, 1) == pytest.approx(mean_at_k(table))
    assert mean_at_k(table) == pytest.approx(np.mean(table))


@pytest.mark.parametrize("k", [0, 3])
def test_more_samples_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=rf"^k is {k}; .*samples, 2\.$"):
        pass_at_k([[1, 0], [1, 1, 1]], k)


def test_the_interval_of_a_share_is_the_binomials():
    values = [1.0] * 80 + [0.0] * 20
    found = mean_interval(values, resamples=4000)
    error = math.sqrt(0.8 * 0.2 / 100)
    assert found.value == pytest.approx(0.8)
    assert found.low == pytest.approx(0.8 - 1.96 * error, abs=0.015)
    assert found.high == pytest.approx(0.8 + 1.96 * error, abs=0.015)
    assert found == mean_interval(values, resamples=4000)
    narrow = mean_interval(values, level=0.5)
    assert found.low < narrow.low < narrow.value < narrow.high < found.high


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """200 experiments of 60 problems: a 90 % interval holds the truth in about 180 of them."""
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        found = mean_interval(generator.normal(2.0, 1.0, 60).tolist(), level=0.9, resamples=400, seed=trial)
        hits += found.low <= 2.0 <= found.high
    assert 165 <= hits <= 195


def test_pairing_takes_the_difficulty_out():
    """Two models that differ by 0.05 on every problem, on problems that differ much: the pair knows it exactly."""
    theirs = np.linspace(0, 0.9, 40)
    found = paired_difference((theirs + 0.05).tolist(), theirs.tolist())
    assert (found.low, found.high) == (pytest.approx(0.05), pytest.approx(0.05))
    alone = mean_interval((theirs + 0.05).tolist())
    assert alone.high - alone.low > 0.1
    with pytest.raises(ValueError, match=r"^there are 1 problems on one side and 2"):
        paired_difference([1.0], [1.0, 2.0])


def test_a_ratio_is_resampled_whole():
    rows = [[30.0, 3.0], [10.0, 1.0], [20.0, 2.0]]
    found = interval(rows, lambda drawn: drawn[..., 0].sum(-1) / drawn[..., 1].sum(-1))
    assert (found.value, found.low, found.high) == (10.0, 10.0, 10.0)


def test_area_weighs_doublings_alike():
    assert area_under_curve([1, 2, 4], [0.0, 1.0, 1.0]) == pytest.approx(0.75)
    assert area_under_curve([2000, 32000], [0.5, 0.5]) == pytest.approx(0.5)
    for tokens, accuracy in (([1], [1.0]), ([2, 2], [1.0, 1.0]), ([0, 2], [1.0, 1.0]), ([1, 2], [1.0])):
        with pytest.raises(ValueError, match=r"^tokens is "):
            area_under_curve(tokens, accuracy)
