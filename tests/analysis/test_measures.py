"""Measures of a small set of judged rollouts, computed by hand, and the rollouts chosen to be shown."""

import math
from dataclasses import replace

import pytest

from bcr.analysis.measures import problem_lengths, summarise
from bcr.analysis.transcripts import telling_rollouts, transcript
from bcr.learner.packs import Example
from bcr.records import Bundle, Problem, Rollout, Segment, Verdict
from bcr.tasks.arithmetic import ArithmeticDialect, build_tokenizer
from bcr.tasks.judging import Judged

DIALECT = ArithmeticDialect(build_tokenizer())
RIGHT, WRONG, SILENT = Verdict.CORRECT, Verdict.WRONG, Verdict.UNANSWERED


def judged(verdicts, tokens, logprob=-0.5, finish="stop", checks=0, name="b"):
    problems = tuple(Problem(f"{name}/{k}", "1 + 2", "3", "test") for k in range(len(verdicts)))
    rollout = Rollout(name, list(range(tokens)), [logprob] * tokens, finish, 4)
    return Judged(Bundle(name, problems, [1], 99), rollout, (Segment(0, 0, tokens),), tuple(verdicts), checks)


def test_measures_by_hand():
    """Two rollouts of three problems and one of two: 8 problems, 40 tokens, 4 of the 8 right."""
    rollouts = [
        judged([RIGHT, RIGHT, WRONG], 10, logprob=-1.0, checks=2),
        judged([RIGHT, SILENT, Verdict.UNPARSED], 20, logprob=-0.25, finish="length", checks=3),
        judged([RIGHT, Verdict.TIMEOUT], 10, logprob=0.0),
    ]
    assert summarise(rollouts) == pytest.approx(
        {
            "accuracy": 0.5,
            "accuracy_se": math.sqrt(0.5 * 0.5 / 8),
            "tokens_per_problem": 5.0,
            "tokens_per_problem_se": math.sqrt((5**2 + 5**2 + 0) * 3 / 2) / 8,
            "tokens_correct": 40 / 3,
            "tokens_wrong": None,
            "checks_per_problem": 5 / 8,
            "problems": 8,
            "truncated": 1 / 3,
            "wrong": 1 / 8,
            "unanswered": 1 / 8,
            "unparsed": 1 / 8,
            "timeout": 1 / 8,
            "error": 0.0,
            "entropy": 15 / 40,
        }
    )


def test_shares_of_all_verdicts_add_up_to_one():
    found = summarise([judged(list(Verdict), 6), judged([RIGHT, Verdict.ERROR], 1)])
    shares = [found["accuracy"], *(found[verdict.value] for verdict in Verdict if verdict is not RIGHT)]
    assert math.fsum(shares) == pytest.approx(1)
    assert found["error"] == 0.25


def test_all_right_has_no_error_bar_and_rambling_counts():
    found = summarise([judged([RIGHT], 3), judged([RIGHT], 97)])
    assert (found["accuracy"], found["accuracy_se"], found["tokens_per_problem"]) == (1.0, 0.0, 50.0)


def test_length_by_outcome_counts_every_segment_and_no_problem_that_was_never_opened():
    """Problem 0 takes 3 + 2 tokens and is right, problem 1 takes 4 and is not; problem 2 was not reached. Then one right in 7."""
    spans = (Segment(0, 0, 3), Segment(1, 3, 7), Segment(0, 7, 9))
    first, second = replace(judged([RIGHT, WRONG, SILENT], 9), segments=spans), judged([RIGHT], 7)
    assert problem_lengths(first) == [(RIGHT, 5), (WRONG, 4)]
    found = summarise([first, second])
    assert (found["tokens_correct"], found["tokens_wrong"]) == (6.0, 4.0)
    assert summarise([judged([SILENT], 7)])["tokens_correct"] is None


def test_nothing_to_summarise_is_said_so():
    with pytest.raises(ValueError, match="no rollouts"):
        summarise([])


def examples_of(rollouts):
    return [Example(one.bundle.prompt_ids, one.rollout.token_ids, one.rollout.logprobs, one.segments, [0.5]) for one in rollouts]


def chosen(rollouts, count):
    half = len(rollouts) // 2
    records = telling_rollouts([rollouts[:half], rollouts[half:]], examples_of(rollouts), DIALECT, count)
    return [(record["kind"], record["bundle"]) for record in records]


def test_the_most_and_the_least_accurate_are_shown():
    rollouts = [
        judged([RIGHT, WRONG], 9, name="half"),
        judged([RIGHT, RIGHT], 9, name="right, long"),
        judged([WRONG, WRONG], 5, name="wrong, short"),
        judged([WRONG, WRONG], 9, name="wrong, long"),
        judged([RIGHT, RIGHT], 5, name="right, short"),
    ]
    assert chosen(rollouts, 1) == [("best", "right, short"), ("worst", "wrong, long")]
    assert chosen(rollouts, 2) == [("best", "right, short"), ("best", "right, long"), ("worst", "wrong, long"), ("worst", "wrong, short")]
    assert chosen(rollouts, 0) == []


@pytest.mark.parametrize("count", range(1, 8))
def test_no_rollout_is_shown_twice(count):
    rollouts = [judged([RIGHT], 1 + k, name=str(k)) for k in range(3)]
    names = [name for _, name in chosen(rollouts, count)]
    assert sorted(names) == sorted(set(names))
    assert len(names) == min(2 * count, 3)


def test_a_transcript_says_what_was_asked_answered_and_credited():
    problems = (Problem("p/0", "7 + 3", "10", "test"), Problem("p/1", "2 * 2", "4", "test"))
    ids = DIALECT.tokenizer.encode("Q1 so 10 . Q2 so 5 . <eos>").ids
    segments = (Segment(0, 0, 4), Segment(1, 4, 9))
    one = Judged(Bundle("b", problems, [1], 99), Rollout("b", ids, [-0.1] * 9, "stop", 4), segments, (RIGHT, WRONG), 0)
    record = transcript(one, Example([1], ids, [-0.1] * 9, segments, [0.5, -0.5]), DIALECT)
    assert record == {
        "bundle": "b",
        "finish": "stop",
        "tokens": 9,
        "policy_version": 4,
        "problems": [
            {"id": "p/0", "question": "7 + 3", "answer": "10", "verdict": "correct"},
            {"id": "p/1", "question": "2 * 2", "answer": "4", "verdict": "wrong"},
        ],
        "segments": [
            {"problem": 0, "tokens": 4, "advantage": 0.5, "text": "Q1 so 10 ."},
            {"problem": 1, "tokens": 5, "advantage": -0.5, "text": "Q2 so 5 . <eos>"},
        ],
    }
