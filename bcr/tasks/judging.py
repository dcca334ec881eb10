"""From a sampled completion to its segments and one verdict for each problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bcr.records import Bundle, Rollout, Segment, Verdict
from bcr.tasks.dialect import Dialect, Finish, Reading


class Grader(Protocol):
    def grade(self, pairs: Sequence[tuple[str, str | None]]) -> list[Verdict]:
        """Verdicts for (gold, answer) pairs, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """A rollout with what became of each of its problems."""

    bundle: Bundle
    rollout: Rollout
    segments: tuple[Segment, ...]
    verdicts: tuple[Verdict, ...]
    checks: int

    @property
    def rewards(self) -> list[float]:
        """1 for a correct answer, 0 for everything else: nothing but accuracy (the length is never looked at)."""
        return [float(verdict is Verdict.CORRECT) for verdict in self.verdicts]

    @property
    def tokens_by_problem(self) -> list[int]:
        """Tokens of all segments of each problem, in prompt order; 0 for one that was never opened. Their sum is the completion."""
        tokens = [0] * len(self.verdicts)
        for segment in self.segments:
            tokens[segment.problem] += segment.stop - segment.start
        return tokens

    @property
    def accuracy(self) -> float:
        return sum(self.rewards) / len(self.verdicts)


def judge(bundles: Sequence[Bundle], groups: Sequence[Sequence[Rollout]], dialect: Dialect, grader: Grader) -> list[list[Judged]]:
    """Judge the rollouts of every bundle; all answers go to the grader in one call."""
    owned = [(bundle, rollout) for bundle, group in zip(bundles, groups, strict=True) for rollout in group]
    readings = [read(rollout, dialect, len(bundle.problems)) for bundle, rollout in owned]
    pairs = [
        (problem.answer, answer)
        for (bundle, _), reading in zip(owned, readings, strict=True)
        for problem, answer in zip(bundle.problems, reading.answers, strict=True)
    ]
    verdicts = iter(grader.grade(pairs))
    judged = iter(
        Judged(bundle, rollout, reading.segments, tuple(next(verdicts) for _ in bundle.problems), dialect.count_checks(rollout.token_ids))
        for (bundle, rollout), reading in zip(owned, readings, strict=True)
    )
    return [[next(judged) for _ in group] for group in groups]


def read(rollout: Rollout, dialect: Dialect, num_problems: int) -> Reading:
    """What a completion says of its N problems. One of N contexts is read context by context, each as the answer to a single problem."""
    if rollout.contexts is None:
        return dialect.read(rollout.token_ids, rollout.finish, num_problems)
    answers, segments, start = list[str | None](), list[Segment](), 0
    for problem, length in enumerate(rollout.contexts):
        tokens = rollout.token_ids[start : start + length]
        finish: Finish = "stop" if tokens and tokens[-1] in dialect.stop_token_ids else "length"
        part = dialect.read(tokens, finish, 1)
        answers += part.answers
        # Its context is over, so no later segment is answerable for a problem, whether it was answered or not.
        segments += [Segment(problem, start + segment.start, start + segment.stop, answered=True) for segment in part.segments]
        start += length
    return Reading(tuple(answers), tuple(segments))
