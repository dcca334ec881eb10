"""Signs of a run that leaves the path of the two stages: found where they were put, and never in noise or in a run that is well."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.analysis.warning_signs import ADVICE, COLLAPSE, EXPLOSION, NAMES, WINDOW, Sign, entropy_explosion, length_collapse, signs

seeds = st.integers(0, 2**31)


def run(accuracy, tokens, entropy, noise=0.0, seed=0, problems=288):
    """Metrics of steps whose expected values are given: binomial accuracy, log-normal length and entropy."""
    draw = np.random.default_rng(seed)
    steps = []
    for step, (share, length, nats) in enumerate(zip(accuracy, tokens, entropy, strict=True)):
        found = draw.binomial(problems, share) / problems if noise else share
        spread = np.exp(draw.normal(0, noise, 2))
        steps.append({"step": step + 1, "accuracy": found, "tokens_per_problem": length * spread[0], "entropy": nats * spread[1]})
    return steps


def two_stages(steps, change):
    """The healthy pattern: length and entropy fall, accuracy dips; then the length stays and both others rise."""
    at = np.arange(steps)
    early, late = np.minimum(at / change, 1), np.maximum(at - change, 0) / max(1, steps - change)
    return 0.6 - 0.12 * early + 0.25 * late, 60 * 0.35**early, 0.4 * (1 - 0.6 * early) * (1 + 0.8 * late)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.02, 0.98),
    st.floats(5, 8000),
    st.floats(0.01, 2.0),
    st.floats(0.01, 0.25),
    st.integers(1, 200),
    st.sampled_from([24, 288]),
    seeds,
)
def test_noise_gives_no_sign(accuracy, tokens, entropy, noise, steps, problems, seed):
    assert signs(run([accuracy] * steps, [tokens] * steps, [entropy] * steps, noise, seed, problems)) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(30, 150), st.integers(4, 25), st.floats(0.0, 0.2), seeds)
def test_the_healthy_pattern_gives_no_sign(steps, change, noise, seed):
    assert signs(run(*two_stages(steps, change), noise, seed)) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(15, 60), st.floats(0.0, 0.1), seeds)
def test_a_collapse_is_seen_soon_after_it_begins(start, noise, seed):
    """From step `start` on accuracy and length go down to nearly nothing within ten steps, and stay there."""
    at = np.minimum(np.maximum(np.arange(start + 30) - start, 0) / 10, 1)
    found = signs(run(0.6 - 0.5 * at, 40 * 0.15**at, np.full(start + 30, 0.3), noise, seed))
    assert [sign.kind for sign in found] == [COLLAPSE]
    assert start < found[0].first <= start + 20
    assert found[0].lasts


@settings(max_examples=40, deadline=None)
@given(st.integers(15, 60), st.floats(0.0, 0.2), seeds)
def test_an_explosion_is_seen_soon_after_it_begins(start, noise, seed):
    at = np.minimum(np.maximum(np.arange(start + 40) - start, 0) / 10, 1)
    found = signs(run(np.full(start + 40, 0.6), np.full(start + 40, 40.0), 0.3 + 1.5 * at, noise, seed))
    assert [sign.kind for sign in found] == [EXPLOSION]
    assert start < found[0].first <= start + 20


def test_what_is_no_collapse():
    level, half, falling = [0.6] * 20, [0.3] * 20, [40.0] * 20 + [20.0] * 20
    assert length_collapse(falling, level + half)
    assert not length_collapse(falling, level + level), "shorter and as accurate is the aim"
    assert not length_collapse([40.0] * 40, level + half), "less accurate at the same length is another matter"
    assert not length_collapse([20.0] * 20 + [40.0] * 20, level + half), "so is a policy that rambles"
    assert not length_collapse(falling[16:25], (level + half)[16:25]), "too few steps"


def test_what_is_no_explosion():
    assert entropy_explosion([0.3] * 20 + [0.7] * 20)
    assert not entropy_explosion([0.6] * 10 + [0.2] * 10 + [0.6] * 20), "back to where it began"
    assert not entropy_explosion([0.01] * 20 + [0.05] * 20), "still next to none"
    assert not entropy_explosion([0.7] * 20 + [0.3] * 20)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_unit_of_length_does_not_matter(scale):
    steps = run([0.6] * 20 + [0.2] * 20, [40.0] * 20 + [20.0] * 20, [0.3] * 40, 0.05, seed=3)
    scaled = [{**step, "tokens_per_problem": step["tokens_per_problem"] * scale} for step in steps]
    assert signs(steps) == signs(scaled) != []


def test_a_sign_that_passes_is_told_as_passed():
    steps = run([0.6] * 20 + [0.2] * 15 + [0.7] * 30, [40.0] * 20 + [20.0] * 45, [0.3] * 65)
    assert signs(steps) == [Sign(COLLAPSE, 22, False)]


def test_steps_without_an_entropy():
    steps = run([0.6] * 60, [40.0] * 60, [0.3] * 30 + [1.5] * 30)
    (with_all,) = signs(steps)
    for index in (3, 40):
        steps[index]["entropy"] = None
    steps[50]["entropy"] = float("nan")
    (found,) = signs(steps)
    assert found.kind == with_all.kind == EXPLOSION
    assert signs([{**step, "entropy": None} for step in steps]) == []
    assert signs([]) == []


def test_every_sign_has_a_name_and_advice():
    assert set(NAMES) == set(ADVICE) == {COLLAPSE, EXPLOSION}
    assert WINDOW >= 2
