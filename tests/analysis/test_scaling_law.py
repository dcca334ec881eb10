"""The power law of tokens over N against numpy's own fit and against data made from one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcr.analysis.scaling_law import fit_scaling_law


@given(st.floats(1, 1000), st.floats(-0.5, 1.5), st.lists(st.integers(1, 16), min_size=2, max_size=8, unique=True))
def test_data_of_a_law_give_it_back(scale, exponent, sizes):
    law = fit_scaling_law(sizes, [scale * n**-exponent for n in sizes])
    assert law.scale == pytest.approx(scale, rel=1e-6)
    assert law.exponent == pytest.approx(exponent, abs=1e-8)
    assert max(map(abs, law.residuals)) < 1e-8


def test_a_noisy_fit_is_that_of_numpy():
    sizes, tokens = [1, 2, 3, 6], [30.9, 30.0, 29.6, 28.1]
    law = fit_scaling_law(sizes, tokens)
    (slope, intercept), covariance = np.polyfit(np.log(sizes), np.log(tokens), 1, cov=True)
    assert law.exponent == pytest.approx(-slope)
    assert law.scale == pytest.approx(np.exp(intercept))
    assert law.exponent_se == pytest.approx(np.sqrt(covariance[0, 0]))
    assert law.monotone
    assert sum(law.residuals) == pytest.approx(0)


def test_order_does_not_matter_and_a_rise_is_seen():
    assert fit_scaling_law([3, 1, 2], [20.0, 40.0, 30.0]).monotone
    assert not fit_scaling_law([1, 2, 3], [40.0, 30.0, 30.5]).monotone
    assert fit_scaling_law([1, 2], [4.0, 2.0]).exponent_se is None


@pytest.mark.parametrize(("sizes", "tokens"), [([1], [3.0]), ([2, 2], [3.0, 3.0]), ([0, 1], [3.0, 3.0]), ([1, 2], [3.0])])
def test_too_little_is_refused(sizes, tokens):
    with pytest.raises(ValueError, match=r"^sizes is .*\.$"):
        fit_scaling_law(sizes, tokens)
    with pytest.raises(ValueError, match=r"^tokens is .*\.$"):
        fit_scaling_law([1, 2], [0.0, 1.0])
