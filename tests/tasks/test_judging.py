"""Judging: every answer goes to the grader once and in order, and each verdict comes back to the problem it belongs to."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcr.records import Rollout, Verdict
from bcr.tasks.arithmetic import MARKERS, ArithmeticDialect, ArithmeticProblems, build_tokenizer, teach
from bcr.tasks.bundles import Budget, make_bundle
from bcr.tasks.judging import judge

calm = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

DIALECT = ArithmeticDialect(build_tokenizer())
PROBLEMS = ArithmeticProblems("train")


class Notebook:
    """A grader that writes down what it is asked and tells equal answers from others."""

    def __init__(self):
        self.calls = []

    def grade(self, pairs):
        self.calls.append(list(pairs))
        return [self.verdict(gold, answer) for gold, answer in pairs]

    @staticmethod
    def verdict(gold, answer):
        if answer is None:
            return Verdict.UNANSWERED
        if answer == "":
            return Verdict.UNPARSED
        return Verdict.CORRECT if answer == gold else Verdict.WRONG


def bundle_of(indices):
    return make_bundle(f"b/{indices}", [PROBLEMS[index] for index in indices], DIALECT, Budget(total=99))


def rollout_of(bundle, text, finish="stop"):
    ids = DIALECT.encode(text.split())
    return Rollout(bundle.id, ids, [-1.0] * len(ids), finish, 0)


def test_each_problem_gets_its_own_verdict():
    bundle = bundle_of([0, 1, 2, 3])
    right = [problem.answer for problem in bundle.problems]
    wrong = str((int(right[3]) + 1) % 13)
    text = f"Q2 so {right[1]} . Q1 7 + 3 = 10 wait check so 1 2 . Q4 so {wrong} . Q1 so <eos>"
    ((judged,),) = judge([bundle], [[rollout_of(bundle, text)]], DIALECT, Notebook())
    assert judged.verdicts == (Verdict.UNPARSED, Verdict.CORRECT, Verdict.UNANSWERED, Verdict.WRONG)
    assert judged.rewards == [0.0, 1.0, 0.0, 0.0]
    assert judged.accuracy == 0.25
    assert judged.checks == 1
    assert [(segment.problem, segment.start, segment.stop) for segment in judged.segments] == [
        (1, 0, 4),
        (0, 4, 16),
        (3, 16, 20),
        (0, 20, 23),
    ]
    assert judged.bundle is bundle


def test_only_a_correct_answer_is_rewarded():
    class Fixed:
        def grade(self, pairs):
            return list(Verdict)

    bundle = bundle_of(range(6))
    ((judged,),) = judge([bundle], [[rollout_of(bundle, "<eos>")]], DIALECT, Fixed())
    assert dict(zip(judged.verdicts, judged.rewards, strict=True)) == {verdict: float(verdict == "correct") for verdict in Verdict}
    assert judged.accuracy == pytest.approx(1 / 6)


@calm
@given(st.lists(st.lists(st.integers(1, 6), max_size=3), max_size=4), st.integers(0, 2**32))
def test_verdicts_come_back_to_their_problems(shape, seed):
    """Bundles of any N, groups of any size: one call to the grader, all pairs in order, and the shape of the groups is kept."""
    rng = random.Random(seed)
    bundles, groups = [], []
    for sizes in shape:
        count = sizes[0] if sizes else 2
        bundle = bundle_of([rng.randrange(99) for _ in range(count)])
        texts = []
        for _ in sizes:
            order = rng.sample(range(count), rng.randint(0, count))
            said = [word for k in order for word in (MARKERS[k], *teach(bundle.problems[k].question, rng, slip=0.2))]
            texts.append(" ".join([*said, "<eos>"]))
        bundles.append(bundle)
        groups.append([rollout_of(bundle, text) for text in texts])
    notebook = Notebook()
    judged = judge(bundles, groups, DIALECT, notebook)
    assert [[one.rollout for one in group] for group in judged] == groups
    assert len(notebook.calls) == 1
    expected_pairs = []
    for bundle, group in zip(bundles, judged, strict=True):
        for one in group:
            assert one.bundle is bundle
            reading = DIALECT.read(one.rollout.token_ids, one.rollout.finish, len(bundle.problems))
            pairs = [(problem.answer, answer) for problem, answer in zip(bundle.problems, reading.answers, strict=True)]
            assert one.verdicts == tuple(Notebook.verdict(*pair) for pair in pairs)
            assert one.segments == reading.segments
            expected_pairs += pairs
    assert notebook.calls[0] == expected_pairs


def test_the_finish_reaches_the_dialect():
    bundle = bundle_of([0])
    text = f"Q1 so {bundle.problems[0].answer} . <eos>"
    groups = [[rollout_of(bundle, text, "length"), rollout_of(bundle, text, "stop")]]
    cut, whole = judge([bundle], groups, DIALECT, Notebook())[0]
    assert (cut.verdicts, whole.verdicts) == ((Verdict.UNANSWERED,), (Verdict.CORRECT,))


def test_a_group_for_every_bundle():
    with pytest.raises(ValueError, match="zip"):
        judge([bundle_of([0])], [], DIALECT, Notebook())
