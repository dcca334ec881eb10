"""The estimate of the time left: exact where the declaration is, and right within a third soon after the start where it is not."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bcr.runtime.progress import seconds_left, spoken

costs = st.lists(st.floats(1, 120), min_size=5, max_size=300)


@given(costs, st.integers(0, 300))
def test_on_the_machine_it_was_declared_on_the_estimate_is_exact(parts, count):
    done = sum(parts[:count])
    assert seconds_left(sum(parts), done, elapsed=done) == pytest.approx(sum(parts[count:]), abs=1e-9)


@given(costs, st.floats(0.5, 6), st.data())
def test_on_another_machine_it_is_right_within_a_third_after_60_declared_seconds(parts, slowness, data):
    """Every part takes its declared cost, times one factor for the machine, times up to 8 % of its own either way."""
    actual = [cost * slowness * data.draw(st.floats(0.92, 1.08)) for cost in parts]
    count = next((k for k in range(len(parts)) if sum(parts[:k]) >= 60), len(parts))
    assume(count < len(parts))
    estimate = seconds_left(sum(parts), sum(parts[:count]), sum(actual[:count]))
    assert abs(estimate - sum(actual[count:])) < sum(actual[count:]) / 3


def test_a_declaration_that_was_wrong_is_forgotten():
    """Declared 400 s, truly 1200: at the start it says 400, after a tenth already more than 900."""
    found = [seconds_left(400, done, 3 * done) for done in (0, 40, 200, 399)]
    assert found[0] == 400
    assert found[1] > 0.75 * 3 * 360
    assert found[2:] == [pytest.approx(600, rel=0.04), pytest.approx(3, rel=0.04)]


@given(st.floats(0, 1e5))
def test_what_is_said_is_near_what_is_meant(seconds):
    words = spoken(seconds).split()
    said = sum(int(number) * {"min": 60, "s": 1}[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert abs(said - seconds) <= 5
