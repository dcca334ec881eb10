"""Guards: each condition is said when it begins, not at every step, and what cannot go on is stopped."""

import json
import math
from pathlib import Path

import pytest

from bcr import train as program
from bcr.learner import step as learner_step
from bcr.learner.off_policy import Share
from bcr.learner.packs import Example
from bcr.runtime.config import compose
from bcr.runtime.guards import GuardConfig, Guards
from bcr.runtime.schema import TrainConfig
from bcr.runtime.stop import RunStopped

RATES = {"truncated": 0.2, "unanswered": 0.1, "unparsed": 0.1}
FINE = {"accuracy": 0.5, "mismatch_kl": 1e-6, **RATES, "skipped": False, "tokens_per_problem": 40.0, "entropy": 0.3}


def kinds(guards: Guards, **metrics: float) -> list[str]:
    return [warning.kind for warning in guards.look({**FINE, **metrics})]


def test_nothing_is_said_of_a_run_that_is_well() -> None:
    guards = Guards(GuardConfig())
    assert [kinds(guards, accuracy=0.3 + step / 100) for step in range(50)] == [[]] * 50


@pytest.mark.parametrize(
    ("kind", "metrics"),
    [
        ("skipped", {"skipped": True}),
        ("mismatch", {"mismatch_kl": 0.02}),
        ("truncated", {"truncated": 1.0}),
        ("unreadable", {"unanswered": 0.75, "unparsed": 0.25}),
    ],
)
def test_a_condition_is_said_when_it_begins_and_every_tenth_step(kind: str, metrics: dict[str, float]) -> None:
    guards = Guards(GuardConfig(max_skipped=100))
    assert kinds(guards) == []
    assert [bool(kinds(guards, **metrics)) for _ in range(12)] == [True] + [False] * 9 + [True, False]
    assert kinds(guards) == []
    (warning,) = guards.look({**FINE, **metrics})
    assert warning.kind == kind
    assert warning.message.endswith(".")


def test_a_fallen_reward_is_said_once_its_mean_is_low() -> None:
    guards = Guards(GuardConfig(window=4, collapse=0.5))
    assert [kinds(guards, accuracy=0.6) for _ in range(8)] == [[]] * 8
    found = [kinds(guards, accuracy=0.0) for _ in range(4)]
    assert found == [[], [], ["collapse"], []]  # 0.45, 0.3 (not below), 0.15, 0


def test_signs_of_leaving_the_two_stages_are_said_when_they_begin() -> None:
    guards = Guards(GuardConfig(collapse=0.0))
    assert [kinds(guards) for _ in range(10)] == [[]] * 10
    assert "length_collapse" in [kind for _ in range(8) for kind in kinds(guards, accuracy=0.1, tokens_per_problem=10.0)]
    guards = Guards(GuardConfig())
    assert [kinds(guards) for _ in range(10)] == [[]] * 10
    assert kinds(guards, entropy=math.nan) == []
    assert [kind for _ in range(8) for kind in kinds(guards, entropy=1.2)] == ["entropy_explosion"]


def test_it_gives_up_after_so_many_skipped_updates_in_a_row() -> None:
    guards = Guards(GuardConfig(max_skipped=2))
    for skipped, ends in ((True, False), (False, False), (True, False), (True, True)):
        guards.look({**FINE, "skipped": skipped})
        assert bool(guards.verdict) == ends


def test_its_state_goes_through_json() -> None:
    first, second = Guards(GuardConfig(window=3)), Guards(GuardConfig(window=3))
    for step in range(5):
        kinds(first, accuracy=0.1 * step, truncated=1.0, skipped=step > 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert vars(second) == vars(first) | {"config": second.config}
    assert [kinds(first, accuracy=0.0, truncated=1.0) for _ in range(9)] == [kinds(second, accuracy=0.0, truncated=1.0) for _ in range(9)]


def run(output: Path, monkeypatch: pytest.MonkeyPatch, poisoned_steps: range, *overrides: str) -> None:
    """A run in which, at those steps (from 0), the second live rollout has a log-prob that is not finite."""
    learn = program.Learner.learn_shares

    def poison(self: program.Learner, shares: list[Share], step: int) -> object:
        if step in poisoned_steps:
            examples = shares[0].examples
            index = [index for index, example in enumerate(examples) if example.has_signal][1]
            bad = examples[index]
            examples[index] = Example(bad.prompt_ids, bad.token_ids, [math.nan] * len(bad.logprobs), bad.segments, bad.advantages)
        return learn(self, shares, step)

    monkeypatch.setattr(program.Learner, "learn_shares", poison)
    small = ["device=cpu", "bundles.per_step=3", "bundles.group=4", "bundles.budget=60", "sampling.row_block=8"]
    program.train(program.prepare(compose("train", [f"output={output}", *small, *overrides], TrainConfig)))


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_update_that_is_not_finite_is_skipped_and_its_rollout_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, monkeypatch, range(1, 2), "steps=3")
    assert [step["updated"] for step in read(tmp_path / "metrics.jsonl")] == [1.0, 0.0, 1.0]
    culprits, warning = (event for event in read(tmp_path / "events.jsonl") if event["kind"] in ("culprits", "skipped"))
    assert culprits["step"] == warning["step"] == 2
    (named,) = culprits["rollouts"]
    assert named["bundle"].startswith("bundle/0/")
    assert 3 <= int(named["bundle"].rsplit("/", 1)[1]) < 6  # the second step's
    assert 0 <= named["sample"] < 4


def test_after_three_in_a_row_the_run_stops_with_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunStopped, match="3 updates in a row"):
        run(tmp_path, monkeypatch, range(1, 9), "steps=9")
    assert [step["updated"] for step in read(tmp_path / "metrics.jsonl")] == [1.0, 0.0, 0.0, 0.0]
    assert (tmp_path / "checkpoints" / "latest" / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_skips_the_update_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient may be finite all the same."""
    pack_loss = learner_step.pack_loss

    def infinite(*args: object) -> object:
        loss, metrics = pack_loss(*args)  # type: ignore[arg-type]
        return loss, metrics | {"loss_sum": metrics["loss_sum"] + math.inf}

    monkeypatch.setattr(learner_step, "pack_loss", infinite)
    run(tmp_path, monkeypatch, range(0), "steps=1")
    assert read(tmp_path / "metrics.jsonl")[0]["updated"] == 0.0
