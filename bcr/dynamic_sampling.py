"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups that teach nothing are replaced by newly sampled ones, up to a bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bcr.tasks.judging import Judged

Group = list[Judged]


@dataclass(frozen=True)
class Replaced:
    """A step's groups after replacement, as many as before and in their places, and what their replacement cost."""

    groups: list[Group]
    dropped_groups: int = 0
    dropped_tokens: int = 0  # sampled for the groups that were dropped


def replace_silent(
    groups: Sequence[Group], has_signal: Callable[[Group], bool], sample: Callable[[int], list[Group]], rounds: int
) -> Replaced:
    """Replace the groups without signal by as many new ones from `sample(count)`, and again those of them without, at most `rounds` times.

    What has no signal even then stays: the step keeps its size. A drawn group is used once, so the stream's cursors are all the state.
    """
    kept, dropped = list(groups), list[Group]()
    for _ in range(rounds):
        silent = [place for place, group in enumerate(kept) if not has_signal(group)]
        if not silent:
            break
        for place, group in zip(silent, sample(len(silent)), strict=True):
            dropped.append(kept[place])
            kept[place] = group
    return Replaced(kept, len(dropped), sum(len(judged.rollout.token_ids) for group in dropped for judged in group))
