"""Advantages: hand-computed cases, and what no completion can do to them, in whatever order it opens its problems."""

import math

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bcr.learner.advantages import (
    EPSILON,
    AdvantageConfig,
    batch_advantages,
    batch_deviation,
    discounted_returns,
    group_advantages,
    normalise,
    responsible_problems,
)
from bcr.learner.credit import make_examples
from bcr.learner.rewards import RewardConfig
from bcr.records import Bundle, Problem, Rollout, Segment, Verdict
from bcr.tasks.judging import Judged

calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CENTRED = AdvantageConfig(scope="problem", normalise_std=False)


def opened(*problems):
    """Segments of three tokens each that open these problems in this order."""
    return [Segment(problem, 3 * k, 3 * k + 3) for k, problem in enumerate(problems)]


orders = st.lists(st.integers(0, 4), max_size=8).map(lambda problems: opened(*problems))
reward_rows = st.lists(st.sampled_from([0.0, 1.0]), min_size=5, max_size=5)
discounts = st.sampled_from([0.25, 0.5, 0.9, 1.0])


# ---- scope: rollout ------------------------------------------------------------------------------------------------------------


def test_rollout_scope_by_hand():
    """Accuracies 1, 1/2, 0, 1/2: mean 1/2, sample standard deviation sqrt(1/6)."""
    rewards = [[1, 1], [1, 0], [0, 0], [0, 1]]
    spans = [opened(0, 1), opened(0), opened(), opened(1, 0, 1)]
    std = math.sqrt(1 / 6) + EPSILON
    top, bottom = 0.5 / std, -0.5 / std
    found = group_advantages(rewards, spans, AdvantageConfig())
    assert found == [pytest.approx([top, top]), [0.0], [], [0.0, 0.0, 0.0]]
    worst = group_advantages(rewards, [opened(0)] * 4, AdvantageConfig())
    assert worst == [pytest.approx([top]), [0.0], pytest.approx([bottom]), [0.0]]


def test_dr_grpo_leaves_the_standard_deviation_out():
    found = group_advantages([[1, 1, 1], [1, 0, 0]], [opened(0, 1, 2)] * 2, AdvantageConfig(normalise_std=False))
    assert found == [pytest.approx([1 / 3] * 3), pytest.approx([-1 / 3] * 3)]


@calm
@given(st.lists(st.tuples(reward_rows, orders), min_size=2, max_size=8), st.booleans())
def test_rollout_scope_gives_every_token_the_same_whatever_the_order(group, by_std):
    rewards, spans = [row for row, _ in group], [segments for _, segments in group]
    found = group_advantages(rewards, spans, AdvantageConfig(normalise_std=by_std))
    assert [len(row) for row in found] == [len(segments) for segments in spans]
    assert all(len(set(row)) <= 1 for row in found)


# ---- scope: problem ------------------------------------------------------------------------------------------------------------


def test_problem_scope_by_hand():
    """Returns-to-go at discount 1/2: (1.75, 1.5, 1), (1, 0, 0), (0.25, 0.5, 1). Means: 1, 2/3, 2/3."""
    rewards = [[1, 1, 1], [1, 0, 0], [0, 0, 1]]
    config = AdvantageConfig(scope="problem", normalise_std=False, discount=0.5)
    found = group_advantages(rewards, [opened(0, 1, 2)] * 3, config)
    expected = [[0.75, 5 / 6, 1 / 3], [0.0, -2 / 3, -2 / 3], [-0.75, -1 / 6, 1 / 3]]
    for row, by_hand in zip(found, expected, strict=True):
        assert row == pytest.approx(by_hand)


def test_problem_scope_over_the_standard_deviation_by_hand():
    """At problem 0 the returns are 2 and 0: mean 1, sample standard deviation sqrt(2). At problem 1 they are 1 and 0."""
    found = group_advantages([[1, 1], [0, 0]], [opened(0, 1)] * 2, AdvantageConfig(scope="problem"))
    first, second = 1 / (math.sqrt(2) + EPSILON), 0.5 / (math.sqrt(0.5) + EPSILON)
    assert found == [pytest.approx([first, second]), pytest.approx([-first, -second])]


def test_a_problem_never_reached_costs_the_segments_before_it():
    """Both answer problem 0; the second spends the budget there. The blame falls on its only segment, and the others of the group,
    compared at problem 1 with a rollout that never got there, are credited for having got there."""
    found = group_advantages([[1, 1], [1, 0]], [opened(0, 1), opened(0)], CENTRED)
    assert found == [[0.5, 0.5], [-0.5]]


def test_discount_zero_is_the_problems_own_reward():
    config = AdvantageConfig(scope="problem", normalise_std=False, discount=0.0)
    assert group_advantages([[1, 0], [1, 1]], [opened(0, 1)] * 2, config) == [[0.0, -0.5], [0.0, 0.5]]


@calm
@given(reward_rows, discounts)
def test_returns_are_the_sums_they_are_defined_by(rewards, discount):
    by_definition = [math.fsum(reward * discount**k for k, reward in enumerate(rewards[j:])) for j in range(len(rewards))]
    assert discounted_returns(rewards, discount) == pytest.approx(by_definition)


@calm
@given(st.lists(reward_rows, min_size=2, max_size=8), st.booleans(), discounts)
def test_advantages_of_a_group_sum_to_zero_at_every_problem(rewards, by_std, discount):
    config = AdvantageConfig(scope="problem", normalise_std=by_std, discount=discount)
    found = group_advantages(rewards, [opened(0, 1, 2, 3, 4)] * len(rewards), config)
    for column in zip(*found, strict=True):
        assert math.fsum(column) == pytest.approx(0, abs=1e-9)


@calm
@given(reward_rows, st.lists(orders, min_size=1, max_size=6), st.booleans(), st.sampled_from(["rollout", "problem"]), discounts)
def test_equal_rewards_give_exactly_zero(row, spans, by_std, scope, discount):
    config = AdvantageConfig(scope=scope, normalise_std=by_std, discount=discount)
    found = group_advantages([row] * len(spans), spans, config)
    assert found == [[0.0] * len(segments) for segments in spans]


@calm
@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.7]), min_size=2, max_size=9))
def test_normalise_keeps_the_order_and_the_scale(scores):
    centred, scaled = normalise(scores, by_std=False), normalise(scores, by_std=True)
    assume(len(set(scores)) > 1)
    assert sorted(range(len(scores)), key=scores.__getitem__) == sorted(range(len(scores)), key=centred.__getitem__)
    assert [c - centred[0] for c in centred] == pytest.approx([s - scores[0] for s in scores])
    std = math.sqrt(sum(c * c for c in centred) / (len(scores) - 1))
    assert scaled == pytest.approx([c / (std + EPSILON) for c in centred])


# ---- answers out of order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "responsible"),
    [
        ((0, 1, 2), [0, 1, 2]),
        ((2, 1, 0), [0, 0, 0]),  # the hard first problem was put off: everything before it answers for it
        ((2, 0, 1), [0, 0, 1]),
        ((1, 2), [0, 0]),  # problem 0 is withheld for good
        ((0, 2, 1), [0, 1, 1]),
        ((0, 0, 1, 0), [0, 0, 1, 0]),  # returning answers from there on
        ((0, 1, 2, 1), [0, 1, 2, 1]),
        ((), []),
    ],
)
def test_whom_a_segment_answers_for(order, responsible):
    assert responsible_problems(opened(*order)) == responsible


@pytest.mark.parametrize(
    ("order", "responsible"),
    [
        ((-0.5, 1, 2), [0, 0, 0]),  # a heading for problem 0 and nothing under it: whoever goes on without an answer answers for it
        ((-0.5, -1, 2, 0, 1), [0, 0, 0, 0, 1]),
        ((-0.5, 0, 1), [0, 0, 1]),
        ((0, -1, 2), [0, 1, 1]),
    ],
)
def test_a_problem_left_without_an_answer_stays_open(order, responsible):
    segments = [Segment(int(abs(problem)), k, k + 1, answered=problem >= 0) for k, problem in enumerate(order)]
    assert responsible_problems(segments) == responsible


def test_skipping_a_problem_gains_nothing():
    """One rollout skips problem 0 and has budget left for problem 1; the other tries 0 in vain and is cut off. Neither is better off."""
    skips = [Segment(0, 0, 3, answered=False), Segment(1, 3, 9)]
    tries = [Segment(0, 0, 9, answered=False)]
    found = group_advantages([[0, 1], [1, 0]], [skips, tries], CENTRED)
    assert found == [[0.0, 0.0], [0.0]]


@calm
@given(orders, st.sets(st.integers(0, 7)))
def test_a_segment_answers_for_its_own_problem_and_all_that_are_still_open(segments, unanswered):
    """The rule, stated otherwise: the smallest of the segment's own problem and those that no segment before it has answered."""
    segments = [Segment(s.problem, s.start, s.stop, answered=k not in unanswered) for k, s in enumerate(segments)]
    for k, (segment, first) in enumerate(zip(segments, responsible_problems(segments), strict=True)):
        before = {earlier.problem for earlier in segments[:k] if earlier.answered}
        assert first == min({segment.problem, *range(6)} - (before - {segment.problem}))


@calm
@given(st.permutations(range(5)), st.integers(0, 5), st.lists(reward_rows, min_size=1, max_size=4), discounts, st.booleans())
def test_reordering_never_escapes_the_blame_for_withheld_problems(order, answered, others, discount, by_std):
    """A rollout opens the first `answered` problems of any order and withholds the rest. Each of its segments would have had a higher
    advantage had a withheld problem been right: none escapes the loss. In prompt order it is only the problems that come later which
    weigh on a segment, so by reordering the blame can only grow."""
    config = AdvantageConfig(scope="problem", normalise_std=by_std, discount=discount)
    given_, withheld = order[:answered], order[answered:]
    segments = opened(*given_)
    rest = [opened(0, 1, 2, 3, 4)] * len(others)

    def advantages(rewards):
        return group_advantages([rewards, *others], [segments, *rest], config)[0]

    lost = [0.0 if problem in withheld else 1.0 for problem in range(5)]
    for problem in withheld:
        mended = [1.0 if problem == p else reward for p, reward in enumerate(lost)]
        for less, more in zip(advantages(lost), advantages(mended), strict=True):
            assert less < more


@calm
@given(st.permutations(range(5)), st.integers(0, 5))
def test_prompt_order_is_never_charged_with_more_than_another_order(order, answered):
    """In prompt order a segment answers for the withheld problems after its own; in any order it answers for all that are withheld."""
    answers, withheld = order[:answered], set(order[answered:])
    for problem, first in zip(answers, responsible_problems(opened(*answers)), strict=True):
        assert {p for p in withheld if p > problem} <= {p for p in withheld if p >= first} == withheld
    assert responsible_problems(opened(*range(answered))) == list(range(answered))


def test_putting_a_hard_problem_off_gains_nothing():
    """Problem 0 is hard. Writing the easy problems 1 and 2 first and never reaching 0 earns exactly what losing problem 0 costs."""
    rewards = [[0, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1]]
    spans = [opened(1, 2), opened(0, 1, 2), opened(1, 2, 0), opened(0, 1, 2)]
    evaded, honest, late, failed = group_advantages(rewards, spans, CENTRED)
    assert evaded == [-0.5, -0.5]
    assert honest == [0.5, 0.0, 0.0]
    assert late == [0.5, 0.5, 0.5]
    assert failed == [-0.5, 0.0, 0.0]


# ---- settings, and the way from judged groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (AdvantageConfig(scope="token"), "advantage.scope is 'token'"),
        (AdvantageConfig(discount=1.1), "advantage.discount is 1.1"),
        (AdvantageConfig(discount=-0.1), "advantage.discount is -0.1"),
    ],
)
def test_bad_settings_are_refused_by_name(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        config.check()


def test_good_settings_pass():
    AdvantageConfig().check()
    AdvantageConfig("problem", normalise_std=False, discount=0.0).check()


def test_examples_keep_the_order_of_the_groups_and_those_without_signal():
    def judged(name, verdicts, length):
        bundle = Bundle(name, tuple(Problem(f"{name}/{k}", "?", "1", "test") for k in range(2)), [1, 2, len(name)], 9)
        rollout = Rollout(name, list(range(length)), [-0.5] * length, "stop", 0)
        return Judged(bundle, rollout, (Segment(0, 0, 1), Segment(1, 1, length)), verdicts, 0)

    right, wrong = (Verdict.CORRECT, Verdict.CORRECT), (Verdict.TIMEOUT, Verdict.CORRECT)
    groups = [[judged("one", right, 3), judged("one", wrong, 4)], [judged("other", right, 5), judged("other", right, 6)]]
    made = make_examples(groups, CENTRED, RewardConfig())
    assert [len(example.token_ids) for example in made] == [3, 4, 5, 6]
    assert [example.prompt_ids for example in made] == [[1, 2, 3], [1, 2, 3], [1, 2, 5], [1, 2, 5]]
    assert [example.advantages for example in made] == [[0.5, 0.0], [-0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert [example.has_signal for example in made] == [True, True, False, False]
    assert made[1].segments == groups[0][1].segments
    assert made[1].logprobs == groups[0][1].rollout.logprobs


# ---- one standard deviation for the batch --------------------------------------------------------------------------------------

BATCH = AdvantageConfig(std_of="batch")


def test_batch_deviation_by_hand():
    """Two groups of four: one success, and two. Centred 3/4, -1/4, -1/4, -1/4 and 1/2, 1/2, -1/2, -1/2: sum of squares 7/4, over 7."""
    rewards = [[[1], [0], [0], [0]], [[1], [1], [0], [0]]]
    spans = [[opened(0)] * 4] * 2
    std = math.sqrt(7 / 4 / 7) + EPSILON
    found = batch_advantages(rewards, spans, BATCH)
    assert found[0] == [pytest.approx([0.75 / std]), *[pytest.approx([-0.25 / std])] * 3]
    assert found[1] == [*[pytest.approx([0.5 / std])] * 2, *[pytest.approx([-0.5 / std])] * 2]


def test_batch_deviation_of_returns_by_hand():
    """Scope problem: returns 2, 1 and 1, 0 of two rollouts; centred 1/2, -1/2 twice: sum of squares 1, over 3."""
    found = batch_advantages([[[1, 1], [1, 0]]], [[opened(0, 1)] * 2], AdvantageConfig(scope="problem", std_of="batch"))
    place = 0.5 / (math.sqrt(1 / 3) + EPSILON)
    assert found == [[pytest.approx([place, place]), pytest.approx([-place, -place])]]


@calm
@given(st.lists(st.lists(reward_rows, min_size=4, max_size=4), min_size=1, max_size=5), st.sampled_from(["rollout", "problem"]))
def test_batch_advantages_are_centred_ones_in_one_scale(groups, scope):
    spans = [[opened(0, 1, 2, 3, 4)] * 4 for _ in groups]
    found = batch_advantages(groups, spans, AdvantageConfig(scope, std_of="batch"))
    centred = batch_advantages(groups, spans, AdvantageConfig(scope, normalise_std=False))
    std = batch_deviation(groups, AdvantageConfig(scope)) + EPSILON
    assert found == [[[pytest.approx(value / std) for value in row] for row in rows] for rows in centred]
    alone = batch_advantages(groups, spans, AdvantageConfig(scope))
    assert alone == [group_advantages(rows, row, AdvantageConfig(scope)) for rows, row in zip(groups, spans, strict=True)]


@pytest.mark.parametrize(("config", "sentence"), [
    (AdvantageConfig(std_of="step"), "std_of is 'step'"),
    (AdvantageConfig(normalise_std=False, std_of="batch"), "no standard deviation is used"),
])  # fmt: skip
def test_bad_standard_deviations(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        config.check()
