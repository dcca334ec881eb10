"""Rollouts as records that a person or a report can read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bcr.learner.packs import Example
from bcr.tasks.dialect import Dialect
from bcr.tasks.judging import Judged


def telling_rollouts(groups: Sequence[Sequence[Judged]], examples: Sequence[Example], dialect: Dialect, count: int) -> list[dict[str, Any]]:
    """The `count` most and `count` least accurate rollouts of a step; of equals the shorter is the better one."""
    judged = [rollout for group in groups for rollout in group]
    order = sorted(range(len(judged)), key=lambda index: (-judged[index].accuracy, len(judged[index].rollout.token_ids)))
    chosen = [("best", index) for index in order[:count]] + [
        ("worst", index) for index in order[::-1][: max(0, min(count, len(order) - count))]
    ]
    return [{"kind": kind, **transcript(judged[index], examples[index], dialect)} for kind, index in chosen]


def transcript(judged: Judged, example: Example | None, dialect: Dialect) -> dict[str, Any]:
    """One rollout: its problems with gold answers and verdicts, and its text segment by segment with advantages (None in an evaluation)."""
    tokens = judged.rollout.token_ids
    advantages = example.advantages if example else [None] * len(judged.segments)
    return {
        "bundle": judged.bundle.id,
        "finish": judged.rollout.finish,
        "tokens": len(tokens),
        "policy_version": judged.rollout.policy_version,
        "problems": [
            {"id": problem.id, "question": problem.question, "answer": problem.answer, "verdict": verdict.value}
            for problem, verdict in zip(judged.bundle.problems, judged.verdicts, strict=True)
        ],
        "segments": [
            {
                "problem": segment.problem,
                "tokens": segment.stop - segment.start,
                "advantage": advantage,
                "text": dialect.tokenizer.decode(tokens[segment.start : segment.stop], skip_special_tokens=False),
            }
            for segment, advantage in zip(judged.segments, advantages, strict=True)
        ],
    }
