"""One answer out of several samples: answers that mean the same are counted together, and the largest group speaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bcr.records import Verdict
from bcr.tasks.judging import Grader


@dataclass(frozen=True, slots=True)
class Agreement:
    """`share` is the part of all samples, silent ones included, that gave `answer` or its equal; None and 0 where none answered."""

    answer: str | None
    share: float


def agree(samples: Sequence[Sequence[str | None]], grader: Grader) -> list[Agreement]:
    """For each problem the answer that most of its samples give (of equals the one given first).

    Equal texts are one answer; different texts are one where the grader says so, with the more frequent text as the gold answer. That is
    self-consistency (Wang et al. 2022, arXiv 2203.11171) with the grader's meaning of equality. All pairs go to the grader in one call.
    """
    counts = [Counter(answer for answer in answers if answer is not None) for answers in samples]
    texts = [[text for text, _ in count.most_common()] for count in counts]  # of equals the first seen comes first
    pairs = [(mine[i], mine[j]) for mine in texts for i in range(len(mine)) for j in range(i + 1, len(mine))]
    same = {pair for pair, verdict in zip(pairs, grader.grade(pairs), strict=True) if verdict is Verdict.CORRECT}
    return [largest(mine, count, same, len(answers)) for mine, count, answers in zip(texts, counts, samples, strict=True)]


def largest(texts: Sequence[str], counts: Counter[str], same: set[tuple[str, str]], total: int) -> Agreement:
    """The largest group: each text joins the first earlier text that it equals."""
    votes: dict[str, int] = {}
    for text in texts:
        leader = next((earlier for earlier in votes if (earlier, text) in same), text)
        votes[leader] = votes.get(leader, 0) + counts[text]
    if not votes:
        return Agreement(None, 0.0)
    answer = max(votes, key=votes.__getitem__)
    return Agreement(answer, votes[answer] / total)
