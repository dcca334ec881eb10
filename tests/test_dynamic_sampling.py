"""Groups that teach nothing are replaced, in their places, at most so often, and what that cost is counted."""

import json
from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from bcr.dynamic_sampling import Group, replace_silent
from bcr.learner.advantages import AdvantageConfig
from bcr.learner.credit import differs_in_accuracy
from bcr.records import Bundle, Problem, Rollout, Segment, Verdict
from bcr.runtime.config import compose
from bcr.runtime.schema import TrainConfig
from bcr.tasks.judging import Judged
from bcr.train import prepare, train


def group(name: str, *accuracies: list[int], tokens: int = 6) -> Group:
    """Rollouts of `tokens` tokens; each row says which problems are right."""
    size = len(accuracies[0])
    bundle = Bundle(name, tuple(Problem(f"{name}/{k}", "1 + 2", "3", "test") for k in range(size)), [1], 9)
    rollout = Rollout(name, [0] * tokens, [-0.1] * tokens, "stop", 0)
    spans = tuple(Segment(k, k * tokens // size, (k + 1) * tokens // size) for k in range(size))
    return [Judged(bundle, rollout, spans, tuple(Verdict.CORRECT if hit else Verdict.WRONG for hit in row), 0) for row in accuracies]


def has_signal(judged: Group) -> bool:
    return differs_in_accuracy(judged, AdvantageConfig())


def source(*groups: Group) -> tuple[Callable[[int], list[Group]], list[Group]]:
    left = list(groups)

    def sample(count: int) -> list[Group]:
        taken, left[:] = left[:count], left[count:]
        return taken

    return sample, left


def test_signal_is_a_difference_in_accuracy_at_the_scope_of_the_credit() -> None:
    swapped = group("b", [1, 0], [0, 1])
    assert not differs_in_accuracy(swapped, AdvantageConfig("rollout"))
    assert differs_in_accuracy(swapped, AdvantageConfig("problem"))


def test_replacement_by_hand() -> None:
    """b is silent, and so is its first replacement c; d is not. e was never needed."""
    a, b = group("a", [1], [0]), group("b", [1], [1], tokens=4)
    sample, left = source(group("c", [0], [0], tokens=5), group("d", [0], [1]), group("e", [0], [1]))
    found = replace_silent([a, b], has_signal, sample, rounds=4)
    assert [kept[0].bundle.id for kept in found.groups] == ["a", "d"]
    assert (found.dropped_groups, found.dropped_tokens) == (2, 2 * 4 + 2 * 5)
    assert [unused[0].bundle.id for unused in left] == ["e"]


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.lists(st.booleans(), min_size=40, max_size=40), st.integers(0, 4))
def test_the_step_keeps_its_size_and_every_group_is_used_once(first: list[bool], later: list[bool], rounds: int) -> None:
    def named(name: str, signal: bool) -> Group:
        return group(name, [1], [0 if signal else 1])

    start = [named(f"s{k}", signal) for k, signal in enumerate(first)]
    sample, left = source(*(named(f"n{k}", signal) for k, signal in enumerate(later)))
    asked: list[int] = []
    found = replace_silent(start, has_signal, lambda count: asked.append(count) or sample(count), rounds)  # type: ignore[func-returns-value]
    assert len(found.groups) == len(start)
    assert all(kept is before for kept, before, signal in zip(found.groups, start, first, strict=True) if signal)
    assert found.dropped_groups == sum(asked) == 40 - len(left)
    assert found.dropped_tokens == 12 * sum(asked)
    silent = sum(not has_signal(kept) for kept in found.groups)
    assert len(asked) == rounds if silent else len(asked) <= rounds
    assert asked == sorted(asked, reverse=True)


OPTIONS = ["experiment=arithmetic_dler", "device=cpu", "threads=1", "bundles.per_step=3", "bundles.group=4", "resume=auto"]


def test_a_resumed_run_draws_the_same_replacements(tmp_path: Path) -> None:
    def run(name: str, steps: int) -> list[dict]:
        train(prepare(compose("train", [*OPTIONS, f"output={tmp_path / name}", f"steps={steps}"], TrainConfig)))
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    once = run("once", 2)
    run("twice", 1)
    assert run("twice", 2) == once
    assert sum(step["dropped_groups"] for step in once) > 0
    for step in once:
        learnt = step["tokens_per_problem"] * step["problems"]
        assert step["problems"] == 12
        assert (step["tokens_sampled"] > learnt + 0.5) == (step["dropped_groups"] > 0)
