"""Every published length reward against cases worked out by hand from its formula."""

import itertools
from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcr.learner.rewards import RULES, RewardConfig, group_rewards
from bcr.records import Bundle, Problem, Rollout, Segment, Verdict
from bcr.tasks.judging import Judged


def rollout(*outcomes):
    """One rollout whose problem j is (correct, tokens)."""
    segments, place = [], 0
    for problem, (_, tokens) in enumerate(outcomes):
        segments.append(Segment(problem, place, place + tokens))
        place += tokens
    problems = tuple(Problem(str(k), "1 + 2", "3", "test") for k in range(len(outcomes)))
    verdicts = tuple(Verdict.CORRECT if correct else Verdict.WRONG for correct, _ in outcomes)
    sampled = Rollout("b", [0] * place, [-0.1] * place, "stop", 0)
    return Judged(Bundle("b", problems, [1], 999), sampled, tuple(segments), verdicts, 0)


def scores(config, *outcomes):
    """Rewards of the G outcomes of one problem."""
    return [row[0] for row in group_rewards([rollout(outcome) for outcome in outcomes], config)]


def sigma(x):
    return 1 / (1 + exp(-x))


CASES = [
    (RewardConfig("truncation", length=10), [(1, 10), (1, 11), (0, 3)], [1, 0, 0]),
    # l = 0.4 (1/2 - (L - 10) / 20): +0.2, 0, -0.2
    (RewardConfig("kimi", coefficient=0.4), [(1, 10), (1, 20), (1, 30), (0, 10), (0, 30)], [1.2, 1.0, 0.8, 0.0, -0.2]),
    (RewardConfig("kimi", coefficient=0.4), [(1, 10), (0, 10)], [1, 0]),
    # 0.01 (100 - L) + 1/2, cut at 0 and 1
    (RewardConfig("l1_max", coefficient=0.01, length=100), [(1, 100), (1, 120), (1, 160), (1, 20), (0, 20)], [0.5, 0.3, 0, 1, 0]),
    (RewardConfig("laser", coefficient=0.5, length=50), [(1, 50), (1, 51), (0, 5), (0, 90)], [1.5, 1, 0, 0]),
    (RewardConfig("laser_d", coefficient=0.5, length=50), [(1, 50), (1, 51), (0, 5), (0, 90)], [1.5, 1, 0, 0.5]),
    # mean 20 and deviation 10 of the correct ones
    (RewardConfig("arora_zanette", coefficient=0.1), [(1, 10), (1, 30), (0, 99)], [1 - 0.1 * sigma(-1), 1 - 0.1 * sigma(1), 0]),
    (RewardConfig("arora_zanette", coefficient=0.1), [(1, 10), (0, 30)], [0.95, 0]),
    (RewardConfig("arora_zanette", coefficient=0.1), [(0, 10), (0, 30)], [0, 0]),
    # the shortest correct one has 20 tokens; without a correct one the mean is 15
    (RewardConfig("shorter_better", coefficient=0.01), [(1, 30), (1, 20), (0, 10)], [1.9, 2.0, -0.1]),
    (RewardConfig("shorter_better", coefficient=0.01), [(0, 10), (0, 20)], [-0.05, -0.05]),
    (RewardConfig("overlong", length=100, buffer=20), [(1, 80), (1, 90), (1, 100), (1, 140), (0, 85)], [1, 0.5, 0, 0, -0.25]),
]


@pytest.mark.parametrize(("config", "outcomes", "expected"), CASES, ids=lambda value: getattr(value, "kind", ""))
def test_by_hand(config, outcomes, expected):
    config.check()
    assert scores(config, *outcomes) == pytest.approx(expected)


def test_each_problem_is_compared_with_itself_in_the_other_rollouts():
    """Of problem 0 the first rollout is the shorter one, of problem 1 the second."""
    group = [rollout((1, 10), (1, 40)), rollout((1, 30), (1, 20))]
    assert group_rewards(group, RewardConfig("kimi", coefficient=0.4)) == [pytest.approx([1.2, 0.8]), pytest.approx([0.8, 1.2])]


SETTINGS = {"coefficient": 0.3, "length": 40, "buffer": 10}
outcomes = st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(1, 100)), min_size=2, max_size=8)


@given(st.sampled_from(sorted(set(RULES) - {"linear_penalty"})), outcomes, st.integers(1, 100))
def test_of_two_equally_long_answers_the_correct_one_never_earns_less(kind, others, tokens):
    config = RewardConfig(kind, **{name: SETTINGS[name] for name in RULES[kind][1]})
    right, wrong, *_ = scores(config, (1, tokens), (0, tokens), *others)
    assert right >= wrong


@given(st.sampled_from(sorted(set(RULES) - {"laser_d"})), outcomes)
def test_a_longer_correct_answer_never_earns_more(kind, others):
    config = RewardConfig(kind, **{name: SETTINGS[name] for name in RULES[kind][1]})
    given = scores(config, *others)
    correct = sorted((tokens, reward) for (right, tokens), reward in zip(others, given, strict=True) if right)
    assert all(reward >= later - 1e-12 for (_, reward), (_, later) in itertools.pairwise(correct))


def test_a_buffer_longer_than_the_cap_is_refused():
    with pytest.raises(ValueError, match=r"^reward.buffer is 30; it must be at most reward.length, 20\.$"):
        RewardConfig("overlong", length=20, buffer=30).check()
