"""The change point between length adaptation and reasoning refinement, against curves whose change is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.analysis.report.stages import FEWEST_STEPS, find_stages


def bent(steps: int, change: int, fall: float, level: float = 20.0, noise: float = 0.0, seed: int = 0) -> list[float]:
    """Tokens that fall exponentially to `level` until step `change`, by the factor `fall`, and stay there."""
    at = np.arange(steps)
    logs = np.log(level) + np.log(fall) * np.maximum(1 - at / change, 0)
    return list(np.exp(logs + np.random.default_rng(seed).normal(0, noise, steps)))


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 40), st.integers(8, 60), st.floats(1.3, 5.0), st.floats(1.0, 5000.0))
def test_a_clean_bend_is_found_where_it_is(change, plateau, fall, level):
    found = find_stages(bent(change + plateau, change, fall, level))
    assert (found.kind, found.change) == ("two stages", change)
    assert found.fit == pytest.approx(bent(change + plateau, change, fall, level), rel=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_a_noisy_bend_is_found_nearby(seed):
    found = find_stages(bent(60, 15, 2.0, noise=0.04, seed=seed))
    assert found.kind == "two stages"
    assert found.change is not None
    assert abs(found.change - 15) <= 4


def test_a_fall_without_a_plateau_has_no_change_point():
    found = find_stages([100 * 0.97**step for step in range(40)])
    assert (found.kind, found.change) == ("still falling", None)
    assert len(found.fit) == 40


@pytest.mark.parametrize("tokens", [[50.0] * 40, [50.0 + step for step in range(40)], [50 - 0.05 * step for step in range(40)]])
def test_what_does_not_fall_by_a_tenth_has_no_stages(tokens):
    assert find_stages(tokens).kind == "no fall"


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_has_no_stages(seed):
    noise = np.random.default_rng(seed).normal(0, 0.05, 60)
    assert find_stages([float(value) for value in 30 * np.exp(noise)]).kind == "no fall"


def test_too_few_steps_are_never_split():
    assert find_stages(bent(FEWEST_STEPS - 1, 4, 3.0)).kind == "no fall"
    assert find_stages([]).kind == "no fall"
    assert find_stages([30.0] * 9 + [0.0] * 9).kind == "no fall"
