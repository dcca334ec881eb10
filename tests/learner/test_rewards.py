"""Rewards by hand, what the length penalty pays for, and settings that a rule does not know."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcr.learner.advantages import AdvantageConfig
from bcr.learner.credit import make_examples
from bcr.learner.rewards import RULES, RewardConfig, group_rewards
from bcr.records import Bundle, Problem, Rollout, Segment, Verdict
from bcr.tasks.judging import Judged

RIGHT, WRONG, SILENT = Verdict.CORRECT, Verdict.WRONG, Verdict.UNANSWERED
PENALTY = RewardConfig("linear_penalty", coefficient=2.0, length=40)


def judged(verdicts, spans):
    """A rollout whose segments are (problem, tokens), laid end to end."""
    segments, place = [], 0
    for problem, tokens in spans:
        segments.append(Segment(problem, place, place + tokens))
        place += tokens
    problems = tuple(Problem(str(k), "1 + 2", "3", "test") for k in range(len(verdicts)))
    return Judged(
        Bundle("b", problems, [1, 2], 99), Rollout("b", [0] * place, [-0.1] * place, "stop", 0), tuple(segments), tuple(verdicts), 0
    )


def test_accuracy_never_looks_at_the_length():
    group = [judged([RIGHT, WRONG, SILENT], [(0, 3), (1, 50)]), judged([RIGHT, RIGHT, Verdict.TIMEOUT], [(0, 90), (1, 1), (2, 1)])]
    assert group_rewards(group, RewardConfig()) == [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


def test_linear_penalty_by_hand():
    """2 over 40: a token costs 0.05. Problem 0 takes 10 + 4 tokens and is right, 1 takes 20 and is not, 2 was not reached."""
    group = [judged([RIGHT, WRONG, SILENT], [(0, 10), (1, 20), (0, 4)]), judged([RIGHT], [(0, 40)])]
    assert group_rewards(group, PENALTY) == [pytest.approx([1 - 0.7, -1.0, 0.0]), pytest.approx([-1.0])]


def test_the_penalty_prefers_a_short_guess_to_a_reasoned_answer():
    """Right in 25 tokens is worth -0.25, wrong in 5 the same; one token less and the guess wins. Accuracy would never say so."""
    reasoned, guess = judged([RIGHT], [(0, 25)]), judged([WRONG], [(0, 4)])
    (long,), (short,) = group_rewards([reasoned, guess], PENALTY)
    assert short > long
    penalised = make_examples([[reasoned, guess]], AdvantageConfig(), PENALTY)
    rewarded = make_examples([[reasoned, guess]], AdvantageConfig(), RewardConfig())
    assert [example.advantages[0] > 0 for example in penalised] == [False, True]
    assert [example.advantages[0] > 0 for example in rewarded] == [True, False]


spans = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=6)
verdicts = st.lists(st.sampled_from(list(Verdict)), min_size=4, max_size=4)


@given(st.lists(st.tuples(verdicts, spans), min_size=1, max_size=5), st.floats(0.1, 3), st.integers(1, 100))
def test_a_rollouts_reward_is_its_accuracy_less_the_price_of_its_tokens(group, coefficient, length):
    rollouts = [judged(outcome, pieces) for outcome, pieces in group]
    rewards = group_rewards(rollouts, RewardConfig("linear_penalty", coefficient, length))
    for rollout, row in zip(rollouts, rewards, strict=True):
        price = coefficient * len(rollout.rollout.token_ids) / (4 * length)
        assert sum(row) / 4 == pytest.approx(rollout.accuracy - price)
        assert sum(rollout.tokens_by_problem) == len(rollout.rollout.token_ids)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kind": "length"}, "reward.kind is 'length'; it must be one of accuracy, linear_penalty,"),
        ({"coefficient": 1.0}, "reward.coefficient is 1.0; reward.kind=accuracy has no use for it"),
        ({"kind": "linear_penalty", "length": 40}, "reward.coefficient is null; reward.kind=linear_penalty needs"),
        ({"kind": "linear_penalty", "coefficient": -1.0, "length": 40}, "reward.coefficient is -1.0; it must be a positive number"),
        ({"kind": "linear_penalty", "coefficient": 1.0, "length": 0}, "reward.length is 0"),
    ],
)
def test_settings_that_a_rule_does_not_know_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        RewardConfig(**settings).check()


def test_every_rule_passes_its_own_check_and_rewards_every_problem():
    group = [judged([RIGHT, WRONG], [(0, 4), (1, 9)]), judged([WRONG, SILENT], [(0, 7)])]
    for kind, (_, used) in RULES.items():
        config = RewardConfig(kind, **dict.fromkeys(used, 2))
        config.check()
        assert [len(row) for row in group_rewards(group, config)] == [2, 2]
