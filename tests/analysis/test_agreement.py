"""The answer that most samples give, by the grader's meaning of equality."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from bcr.analysis.agreement import Agreement, agree
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.grading import grade


class Direct:
    """The grader without its processes."""

    def grade(self, pairs):
        return [grade(gold, answer) for gold, answer in pairs]


def test_equal_answers_are_counted_together():
    samples = [["1/2", "3", "0.5", "\\frac{1}{2}", None], ["7", "8"], [None, None], ["x+1", "1+x", "2"]]
    with GraderPool(1) as pool:
        found = agree(samples, pool)
    assert found == [Agreement("1/2", 0.6), Agreement("7", 0.5), Agreement(None, 0.0), Agreement("x+1", 2 / 3)]


@given(st.lists(st.one_of(st.none(), st.integers(0, 3).map(str)), min_size=1, max_size=9))
def test_plain_answers_are_a_plain_vote(answers):
    (found,) = agree([answers], Direct())
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        assert found == Agreement(None, 0.0)
    else:
        assert found.share == max(votes.values()) / len(answers)
        assert found.answer == next(a for a in answers if a is not None and votes[a] == max(votes.values()))
