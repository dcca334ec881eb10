"""Laser-D's targets against cases worked out by hand, and that a run takes them with it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcr.learner.rewards import RewardConfig
from bcr.learner.targets import MovingTargets, classes_of
from bcr.runtime.config import compose
from bcr.runtime.schema import TrainConfig
from bcr.train import prepare, train
from tests.learner.test_length_rewards import rollout

LASER = RewardConfig("laser", coefficient=0.5, length=24, moving=True)
EASY = [rollout((1, tokens)) for tokens in range(10, 18)]  # 8 of 8 right, in 10 to 17 tokens
MEDIUM = [rollout((tokens % 2, tokens)) for tokens in range(20, 28)]
HARD = [rollout((tokens == 40, tokens)) for tokens in range(40, 48)]


def test_classes_by_hand() -> None:
    assert [classes_of(group) for group in (EASY, MEDIUM, HARD)] == [["easy"], ["medium"], ["hard"]]
    thirds = [rollout((1, 1), (0, 1)), rollout((1, 1), (0, 1)), rollout((0, 1), (1, 1))]
    assert classes_of(thirds) == ["easy", "medium"]  # 2/3 and 1/3 belong to the class above


def test_targets_by_hand() -> None:
    """Of 8 at least 5, 2 and 1 are right. 1/5 of the 8 lengths: the second; 1/2: the fourth; 1: the last."""
    targets = MovingTargets(LASER)
    targets.update([EASY, MEDIUM, HARD])
    assert targets.metrics == {"target_easy": 11, "target_medium": 23, "target_hard": 47}
    targets.update([EASY])
    assert targets.lengths["hard"] == 47  # nothing was learnt of it
    assert targets.rewards(EASY) == [[1.5], [1.5], *[[1.0]] * 6]
    assert targets.rewards(HARD) == [[1.5], *[[0.0]] * 7]


def test_each_problem_of_a_bundle_has_the_target_of_its_own_class() -> None:
    targets = MovingTargets(RewardConfig("laser_d", coefficient=0.5, length=24, moving=True))
    targets.lengths = {"easy": 10, "medium": 20, "hard": 30}
    group = [rollout((1, 15), (0, 25)), rollout((1, 9), (0, 35))]
    assert targets.rewards(group) == [[1.0, 0.0], [1.5, 0.5]]


@given(st.lists(st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(1, 60)), min_size=6, max_size=6), min_size=1, max_size=5))
def test_a_right_answer_can_be_expected_within_the_target_and_not_within_less(columns: list[list[tuple[int, int]]]) -> None:
    groups = [[rollout(outcome) for outcome in column] for column in columns]
    targets = MovingTargets(LASER)
    targets.update(groups)
    for name, right in (("easy", 4), ("medium", 2), ("hard", 1)):
        lengths = [tokens for group in groups if classes_of(group) == [name] for judged in group for tokens in judged.tokens_by_problem]
        if not lengths:
            assert targets.lengths[name] == 24
            continue
        expected = [right * sum(tokens <= target for tokens in lengths) for target in (targets.lengths[name], targets.lengths[name] - 1)]
        assert expected[0] >= len(lengths) > expected[1]


def test_they_are_refused_where_there_is_no_target() -> None:
    with pytest.raises(ValueError, match="kimi has no targets to move"):
        RewardConfig("kimi", coefficient=0.4, moving=True).check()


def test_a_resumed_run_has_its_targets(tmp_path: Path) -> None:
    options = ["experiment=arithmetic_laser_d_moving", "device=cpu", "threads=1", "bundles.per_step=3", "bundles.group=4", "resume=auto"]

    def run(name: str, steps: int) -> list[dict]:
        train(prepare(compose("train", [*options, f"output={tmp_path / name}", f"steps={steps}"], TrainConfig)))
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    once = run("once", 2)
    run("twice", 1)
    assert run("twice", 2) == once
    assert [once[0][f"target_{name}"] for name in ("easy", "medium", "hard")] == [24, 24, 24]
    assert once[1]["target_easy"] != 24
