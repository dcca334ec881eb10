"""Sampling beside learning, on ranks of its own: byte for byte the run of ranks that do both in turn with rollouts that wait a step."""

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bcr import train as program
from bcr.parallel.handover import Handover
from bcr.parallel.ranks import Ranks
from bcr.rollouts import Batch, RolloutStream
from bcr.runtime.config import compose
from bcr.runtime.schema import TrainConfig
from tests.parallel.launch import on_ranks
from tests.parallel.test_training import SMALL, children, close, cut_off, files, read, run, torchrun, wait_for

OPTIONS = ["loss.importance_cap=2", "off_policy.updates=3"]
IN_TURN, BESIDE = "off_policy.staleness=1", "parallel.samplers=1"


def at_once(output: str, overrides: list[str]) -> None:
    """The program, in which neither side of the second step ends before the other has begun: it fails if they take turns."""
    place = Path(output).parent
    place.mkdir(parents=True, exist_ok=True)
    learn, ahead = program.Learner.learn_shares, RolloutStream.ahead

    def begin(mine: str, other: str) -> None:
        (place / mine).touch()
        since = time.monotonic()
        while not (place / other).exists():
            assert time.monotonic() - since < 60, f"{other} has not begun"
            time.sleep(0.01)

    def learn_shares(self: program.Learner, shares: list, step: int) -> program.Learned:
        if step == 1:
            begin("learning", "sampling")
        return learn(self, shares, step)

    def sample_ahead(self: RolloutStream) -> list[Batch]:
        if os.environ["RANK"] == "1" and self.sampler.policy_version == 1:
            begin("sampling", "learning")
        return ahead(self)

    program.Learner.learn_shares, RolloutStream.ahead = learn_shares, sample_ahead  # type: ignore[method-assign]
    run(output, overrides)


def train(ranks: int, output: Path, *overrides: str, body: Callable[..., None] = run) -> Path:
    on_ranks(ranks, body, str(output), [*OPTIONS, *overrides], join=False)
    return output


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(1, tmp_path_factory.mktemp("in_turn") / "run", IN_TURN)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(2, tmp_path_factory.mktemp("beside") / "run", BESIDE, body=at_once)


def test_it_is_the_run_whose_rollouts_wait_a_step(in_turn: Path, beside: Path) -> None:
    """One rank that learns, one that samples: metrics, rollouts, weights and optimizer state to the last byte. From the second step on
    rollouts are one update old, so that sampler and learner differ, and the times say who waited."""
    assert (beside.parent / "learning").exists()
    assert files(beside) == files(in_turn)
    metrics, timings = read(beside / "metrics.jsonl"), read(beside / "timings.jsonl")
    assert len(metrics) == len(timings) > 2
    assert metrics[0]["mismatch_kl"] < 1e-6 < min(step["mismatch_kl"] for step in metrics[1:])
    assert all({"policy_kl", "importance_mean", "importance_capped"} <= step.keys() for step in metrics)
    assert all({"seconds_waiting_for_samplers", "seconds_waiting_for_learners", "seconds_sampling"} <= step.keys() for step in timings)


@pytest.mark.parametrize(
    ("before", "ranks", "after"), [(BESIDE, 2, BESIDE), (BESIDE, 1, IN_TURN), pytest.param(IN_TURN, 2, BESIDE, marks=pytest.mark.slow)]
)
def test_it_resumes_bit_for_bit_with_samplers_and_without(
    before: str, ranks: int, after: str, in_turn: Path, beside: Path, tmp_path: Path
) -> None:
    again = train(ranks, cut_off(beside if before == BESIDE else in_turn, tmp_path), after)
    assert files(again) == files(in_turn)
    said = (tmp_path / "said.txt").read_text()
    assert ("written by 2 ranks, 1 of them samplers, read by 1;" in said) == (before == BESIDE and ranks == 1)
    assert ("written by 1 ranks, read by 2, 1 of them samplers;" in said) == (before == IN_TURN)


def sabotaged(output: str, how: str) -> None:
    """What befalls one side in the second step, while the other waits for it."""
    place, calls, work = Path(output).parent, itertools.count(1), program.make_examples
    raising = {"sampler raises": "1", "learner raises": "0"}

    def suffer(*args: Any) -> Any:
        if next(calls) == 2:
            if raising.get(how) == os.environ["RANK"]:
                (place / "raised").write_text(str(time.time()))
                raise KeyError("planted")
            if how == "signal" and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
        return work(*args)

    program.make_examples = suffer
    run(output, [BESIDE, "steps=50", "checkpoint_every=50"])


@pytest.mark.parametrize("how", ["sampler raises", pytest.param("learner raises", marks=pytest.mark.slow)])
def test_a_side_that_raises_stops_the_other(how: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="left"):
        on_ranks(2, sabotaged, str(tmp_path / "run"), how, join=False)
    assert time.time() - float((tmp_path / "raised").read_text()) < 30
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.slow
def test_a_signal_to_a_sampler_ends_the_step_of_all(tmp_path: Path) -> None:
    on_ranks(2, sabotaged, str(tmp_path / "run"), "signal", join=False)
    assert "stopped after step 2 of 50; resume=auto goes on from there." in (tmp_path / "said.txt").read_text()
    assert os.readlink(tmp_path / "run" / "checkpoints" / "latest") == "step-000002"


def poisoned(output: str) -> str:
    """Every update is skipped; what the run ends with."""
    program.make_examples = lambda *args, make=program.make_examples: [
        program.Example(e.prompt_ids, e.token_ids, e.logprobs, e.segments, [float("inf")] * len(e.advantages)) for e in make(*args)
    ]
    with pytest.raises(program.RunStopped) as verdict:
        run(output, [BESIDE, "steps=9", "guards.max_skipped=2"])
    return str(verdict.value)


@pytest.mark.slow
def test_the_verdict_of_the_guards_is_the_samplers_too(tmp_path: Path) -> None:
    learner, sampler = on_ranks(2, poisoned, str(tmp_path / "run"), join=False)
    assert learner == sampler != ""
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 2
    assert os.readlink(tmp_path / "run" / "checkpoints" / "latest") == "step-000002"


@pytest.mark.slow
def test_shards_on_some_ranks_and_rollouts_from_the_others(in_turn: Path, tmp_path: Path) -> None:
    """Two that learn are two that do both, byte for byte: one sampler, two, contexts of their own; and any number resumes any other."""
    options = ["loss.kl_coef=0.1", "bundles.contexts=separate", "advantage.scope=problem"]
    both = train(2, tmp_path / "both" / "run", IN_TURN, *options)
    for ranks, samplers, more in ((3, 1, []), (4, 2, ["parallel.shard_size=1"])):
        apart = train(ranks, tmp_path / str(ranks) / "run", f"parallel.samplers={samplers}", *options, *more)
        if more:  # copies are summed in another order than shards
            same_up_to_rounding(apart, both)
        else:
            assert files(apart) == files(both)
    again = train(2, cut_off(tmp_path / "3" / "run", tmp_path / "again"), BESIDE, *options)
    same_up_to_rounding(again, both)


def same_up_to_rounding(left: Path, right: Path) -> None:
    for mine, theirs in zip(*(read(folder / "metrics.jsonl") for folder in (left, right)), strict=True):
        assert mine.pop("loss") == pytest.approx(theirs.pop("loss"), rel=2e-3)  # with a KL term it is no sum that is 0
        close(mine, theirs, 2e-3)


def holding(output: str, overrides: list[str]) -> dict[str, bool]:
    """What a rank holds at the end of its run."""
    prepared = program.prepare(compose("train", [f"output={output}", *SMALL, *OPTIONS, *overrides], TrainConfig))
    program.main(prepared)
    sampler, model = prepared.sampler, prepared.task.model
    return {"cache": sampler._cache is not None, "reserve": sampler.learner_bytes > 0, "whole copy": not model.head_weight.is_meta}


@pytest.mark.slow
def test_adapters_in_bfloat16_and_what_each_side_holds(tmp_path: Path) -> None:
    options = ["model.lora.rank=2", "model.dtype=bfloat16", "optimizer.lr=0.01"]
    both = train(2, tmp_path / "both" / "run", IN_TURN, *options)
    held = on_ranks(3, holding, str(tmp_path / "apart"), [BESIDE, *options], join=False)
    assert files(tmp_path / "apart") == files(both)
    assert held == [{"cache": False, "reserve": True, "whole copy": False}] * 2 + [{"cache": True, "reserve": False, "whole copy": True}]


def test_what_cannot_be_split_is_refused() -> None:
    for size, samplers, phrase in (
        (4, -1, "parallel.samplers is -1; it must not be negative."),
        (1, 1, "parallel.samplers is 1 and this is one process alone; start more with torchrun, or set it to 0."),
        (2, 2, "parallel.samplers is 2 of 2 ranks; it must leave one at least to learn."),
    ):
        with pytest.raises(ValueError, match=r"^parallel\.samplers is") as refusal:
            Handover(Ranks("cpu", 0, size), samplers)
        assert str(refusal.value) == phrase


def test_the_shards_of_some_ranks_stay_inside_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two machines of eight: the first alone, one and a half, and some of the first."""
    monkeypatch.setattr("bcr.parallel.ranks.DeviceMesh", lambda device, mesh, mesh_dim_names: torch.as_tensor(mesh).shape)
    meshes = [tuple(Ranks("cpu", 0, size, 0, 8).mesh()) for size in (16, 12, 8, 6)]
    assert meshes == [(2, 8), (3, 4), (8,), (6,)]


@pytest.mark.slow
def test_torchrun_ends_with_0_after_a_signal_to_a_sampler_and_goes_on(tmp_path: Path) -> None:
    output, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    process = torchrun(f"output={output}", *SMALL, "steps=500", "checkpoint_every=null", BESIDE)
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    os.kill(children(process)[1], signal.SIGTERM)
    said, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    steps = len(read(metrics))
    assert f"stopped after step {steps} of 500; resume=auto goes on from there." in said
    process = torchrun(f"output={output}", *SMALL, f"steps={steps + 1}", "checkpoint_every=null", BESIDE)
    said, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    assert f"step-{steps:06d}, after step {steps}" in said
    assert len(read(metrics)) == steps + 1


@pytest.mark.slow
def test_a_failing_sampler_says_why_first(tmp_path: Path) -> None:
    """It raises while it judges the second batch, and the learner learns from the first."""
    process = torchrun(f"output={tmp_path / 'run'}", *SMALL, BESIDE, module="tests.parallel.failing")
    said, error = process.communicate(timeout=100)
    assert process.returncode == 1
    told = float(next(line for line in said.splitlines() if line.startswith("raising at")).split()[-1])
    assert time.time() - told < 30
    assert error.count("KeyError: 'planted'") == 1
    assert "Traceback" not in error[: error.index("rank 1 of 2 failed, which stops the run:")]
    assert "rank 0 of 2 failed" not in error
