"""Rollouts as the page shows them: pairs on the same problems (base against another run), and training rollouts with their advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bcr.analysis.report.folder import Record, Results, Run

MOST_STEPS = 10  # steps of a run whose rollouts are shown
LONGEST_TEXT = 2400  # characters of a segment; the middle of longer ones is left out
SIGNS = {"correct": "✓", "wrong": "✗", "unanswered": "–", "unparsed": "?", "timeout": "⧗", "error": "!"}


@dataclass(frozen=True)
class SegmentView:
    """`advantage` None: not a training rollout. `strength` in 0..1 is |advantage| over the largest of the run."""

    number: int
    verdict: str
    tokens: int
    text: str
    advantage: float | None
    strength: float


@dataclass(frozen=True)
class RolloutView:
    """`outcome`: the verdict of each problem; `unseen`: whether there are problems that no segment belongs to."""

    heading: str
    outcome: list[str]
    unseen: bool
    segments: list[SegmentView]
    tokens: int
    per_problem: float
    correct: int
    cut_off: bool


@dataclass(frozen=True)
class Item:
    """One entry of a list with filters. `tags` are what the verdict filter asks for; `place` is N or a step; `length` is per problem."""

    run: str
    place: int
    tags: str
    length: float
    problems: list[Record]
    rollouts: list[RolloutView]


@dataclass(frozen=True)
class Listing:
    """`runs`: (key, title) to choose from; `places`: the values of `place`; `tags`: those that occur."""

    items: list[Item]
    runs: list[tuple[str, str]]
    places: list[int]
    tags: list[str]


def pairs(results: Results) -> Listing:
    """Every bundle that the base and another run both answered, the base first."""
    answered = {(line["run"], int(line["size"]), line["bundle"]): line for line in results.evaluations}
    others = [run for run in results.runs if run.key != "base"]
    items = []
    for (run_key, size, bundle), base in answered.items():
        if run_key != "base":
            continue
        for run in others:
            line = answered.get((run.key, size, bundle))
            if line is not None:
                tags = verdicts(line) | changes(base, line)
                rollouts = [view(base, "base"), view(line, run.label)]
                items.append(Item(run.key, size, spaced(tags), rollouts[1].per_problem, line["problems"], rollouts))
    items.sort(key=lambda item: ([run.key for run in others].index(item.run), item.place))
    return listing(items, others)


def training_rollouts(runs: Sequence[Run]) -> Listing:
    """The recorded rollouts of some steps of each run: the best and the worst ones of a step."""
    items = []
    for run in runs:
        lines = run.training.rollouts if run.training else []
        every = sorted({int(line["step"]) for line in lines})
        chosen = set(evenly(every, MOST_STEPS))
        kept = [line for line in lines if int(line["step"]) in chosen]
        largest = max((abs(segment["advantage"] or 0.0) for line in kept for segment in line["segments"]), default=0.0)
        for line in kept:
            rollout = view(line, f"Step {line['step']}, one of the {line.get('kind', '')}".rstrip(), largest)
            items.append(Item(run.key, int(line["step"]), spaced(verdicts(line)), rollout.per_problem, line["problems"], [rollout]))
    return listing(items, runs)


def listing(items: list[Item], runs: Sequence[Run]) -> Listing:
    present = {item.run for item in items}
    tags = sorted({tag for item in items for tag in item.tags.split()}, key=lambda tag: [*SIGNS, "gained", "lost"].index(tag))
    return Listing(items, [(run.key, run.title) for run in runs if run.key in present], sorted({item.place for item in items}), tags)


def view(line: Record, heading: str, largest: float = 0.0) -> RolloutView:
    outcome = [problem["verdict"] for problem in line["problems"]]
    segments = [
        SegmentView(
            segment["problem"] + 1,
            outcome[segment["problem"]],
            segment["tokens"],
            shortened(segment["text"]),
            segment["advantage"],
            abs(segment["advantage"] or 0.0) / largest if largest else 0.0,
        )
        for segment in line["segments"]
    ]
    per_problem = line["tokens"] / len(outcome)
    unseen = {segment.number for segment in segments} != set(range(1, len(outcome) + 1))
    return RolloutView(
        heading, outcome, unseen, segments, line["tokens"], per_problem, outcome.count("correct"), line["finish"] == "length"
    )


def verdicts(line: Record) -> set[str]:
    return {problem["verdict"] for problem in line["problems"]}


def changes(base: Record, line: Record) -> set[str]:
    """ "gained": a problem that only the run answers correctly; "lost": one that only the base does."""
    both = list(zip(base["problems"], line["problems"], strict=True))
    gained = any(now["verdict"] == "correct" != before["verdict"] for before, now in both)
    lost = any(before["verdict"] == "correct" != now["verdict"] for before, now in both)
    return {name for name, found in (("gained", gained), ("lost", lost)) if found}


def spaced(tags: set[str]) -> str:
    return " ".join(sorted(tags))


def evenly(values: Sequence[int], most: int) -> list[int]:
    """At most `most` of the values, the first and the last among them.

    >>> evenly([1, 2, 3, 4, 5, 6, 7], 3)
    [1, 4, 7]
    """
    if len(values) <= most:
        return list(values)
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def shortened(text: str) -> str:
    """The text, or its beginning and end where it is long."""
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"
