"""A run that is cut off anywhere and resumed is the run that was not, bit for bit; what cannot be resumed is refused in one sentence."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bcr import assemble
from bcr import train as program
from bcr.model import load_pretrained
from bcr.runtime import training_state
from bcr.runtime.config import compose
from bcr.runtime.schema import TrainConfig
from bcr.runtime.training_state import random_states, restore_random_states
from tests.runtime import torture

SMALL = [
    *("device=cpu", "resume=auto", "bundles.per_step=2", "bundles.group=4", "sampling.row_block=8"),
    *("bundles.sizes=[1,2]", "bundles.budget=null", "bundles.budget_per_problem=25", "optimizer.warmup_steps=4"),
]


def run(output: Path, *overrides: str, stop_after: int | None = None) -> None:
    asked = itertools.count(1)
    config = compose("train", [f"output={output}", *SMALL, *overrides], TrainConfig)
    program.train(program.prepare(config), stop=(lambda: next(asked) == stop_after) if stop_after else lambda: False)


def files(output: Path) -> dict[str, bytes]:
    """What a resumed run must have in common with an undisturbed one. (Cards name the output folder; timings and offsets tell the time.)"""
    kept = [*output.glob("*.jsonl"), *output.glob("checkpoints/step-000006/**/*")]
    changing = ("timings.jsonl", "README.md", ".metadata", "state.json", "checksums.sha256")
    return {str(file.relative_to(output)): file.read_bytes() for file in kept if file.is_file() and file.name not in changing}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with a checkpoint at every second."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run(output, "steps=6", "checkpoint_every=2")
    return output


@pytest.fixture
def earlier(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of it that can be spoilt."""
    shutil.copytree(undisturbed, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.mark.parametrize("first", [["steps=6"], ["steps=3"]], ids=["stopped", "extended"])
def test_six_steps_are_three_and_three_more(first: list[str], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whether it was asked to stop after the third step or was only to have three."""
    run(tmp_path / "run", *first, stop_after=3 if first == ["steps=6"] else None)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    run(tmp_path / "run", "steps=6")
    assert "step-000003, after step 3" in capsys.readouterr().out
    assert files(tmp_path / "run") == files(undisturbed)
    weights = [load_pretrained(folder / "checkpoints" / "latest") for folder in (tmp_path / "run", undisturbed)]
    assert all(torch.equal(left, right) for left, right in zip(*(model.parameters() for model in weights), strict=True))
    run(tmp_path / "run", "steps=6")  # there is nothing left to do
    assert files(tmp_path / "run") == files(undisturbed)


def test_waiting_rollouts_and_the_reference_come_back_too(tmp_path: Path) -> None:
    """Options whose state is more than weights: batches that wait, several updates, a reference that is the model of the very start."""
    options = ["steps=4", "off_policy.staleness=1", "off_policy.updates=2", "loss.importance_cap=2", "loss.kl_coef=0.1"]
    run(tmp_path / "once", *options)
    run(tmp_path / "twice", *options, stop_after=2)
    run(tmp_path / "twice", *options)
    last = "checkpoints/step-000004"
    for file in ("metrics.jsonl", "rollouts.jsonl", f"{last}/model.safetensors", f"{last}/training/__0_0.distcp"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file
    metrics = [json.loads(line) for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    assert [step["reference_kl"] > 0 for step in metrics] == [True] * 4  # of the first step too: its second update has moved


def test_adapters_come_back_too(tmp_path: Path) -> None:
    """Adapter, moments and reference in bfloat16, where masters are more than the weights tell; and what is saved can be started from."""
    options = ["steps=4", "model.lora.rank=2", "model.dtype=bfloat16", "loss.kl_coef=0.1", "optimizer.lr=0.01"]
    run(tmp_path / "once", *options)
    run(tmp_path / "twice", *options, stop_after=2)
    run(tmp_path / "twice", *options)
    last = "checkpoints/step-000004"
    adapter = f"{last}/adapter/adapter_model.safetensors"
    for file in ("metrics.jsonl", "rollouts.jsonl", f"{last}/model.safetensors", adapter, f"{last}/training/__0_0.distcp"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file
    metrics = [json.loads(line) for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    assert all(step["updated"] == 1.0 and step["dlogprob_mean"] < 0.02 for step in metrics)
    assert metrics[-1]["reference_kl"] > metrics[0]["reference_kl"]
    run(tmp_path / "onward", "steps=1", f"model.lora.path={tmp_path / 'once' / last / 'adapter'}", "optimizer.lr=1e-12")
    written = [
        load_file(folder / "checkpoints" / "latest" / "adapter" / "adapter_model.safetensors")
        for folder in (tmp_path / "once", tmp_path / "onward")
    ]
    assert all(torch.allclose(written[0][name].float(), tensor) for name, tensor in written[1].items())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def half_written(folder: Path) -> None:
    """Killed while writing, on a disk that kept only part of it."""
    (folder / "checksums.sha256").unlink()
    (folder / "training" / "state.json").unlink()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "model.safetensors is not what was written"),
        (lambda folder: flip(folder / "training" / "__0_0.distcp"), "__0_0.distcp is not what was written"),
        (lambda folder: (folder / "training" / ".metadata").unlink(), ".metadata is missing"),
        (half_written, "checksums.sha256 is missing"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    harm: Callable[[Path], None], said: str, earlier: Path, undisturbed: Path, capsys: pytest.CaptureFixture
) -> None:
    harm(earlier / "checkpoints" / "step-000006")
    run(earlier, "steps=6", "checkpoint_every=2")
    told = capsys.readouterr().out
    assert f"step-000006 cannot be used: {said}" in told.replace("training/", "")
    assert "step-000004, after step 4" in told
    assert files(earlier) == files(undisturbed)


def test_leftovers_of_a_kill_are_put_right(earlier: Path, undisturbed: Path) -> None:
    """One killed between the two renames of a checkpoint, one in the middle of a line, one before `latest` moved."""
    folder = earlier / "checkpoints"
    (folder / "step-000006").rename(folder / ".step-000006.previous")
    (folder / ".step-000008.partial").mkdir()
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("step-000002")
    with (earlier / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "accur')
    run(earlier, "steps=6", "checkpoint_every=2")
    assert files(earlier) == files(undisturbed)
    assert sorted(os.listdir(folder)) == ["latest", "step-000002", "step-000004", "step-000006"]
    assert os.readlink(folder / "latest") == "step-000006"


def test_lines_that_are_gone_send_it_further_back(earlier: Path, undisturbed: Path, capsys: pytest.CaptureFixture) -> None:
    lines = (earlier / "metrics.jsonl").read_text().splitlines(keepends=True)
    (earlier / "metrics.jsonl").write_text("".join(lines[:5]))
    run(earlier, "steps=6", "checkpoint_every=2")
    assert "metrics.jsonl has" in capsys.readouterr().out
    assert files(earlier) == files(undisturbed)


def test_cut_off_before_the_first_checkpoint_it_starts_again(undisturbed: Path, earlier: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(earlier / "checkpoints")
    run(earlier, "steps=6", "checkpoint_every=2")
    assert "starts again at step 1" in capsys.readouterr().out
    assert files(earlier) == files(undisturbed)


def test_without_a_whole_checkpoint_it_is_refused(earlier: Path) -> None:
    for folder in (earlier / "checkpoints").glob("step-*"):
        half_written(folder)
    with pytest.raises(ValueError, match=r"no checkpoint to resume from .*step-000006.*step-000002.*overwrite=true"):
        run(earlier, "steps=6")


def test_another_config_is_refused_and_its_fields_are_named(earlier: Path) -> None:
    before = files(earlier)
    with pytest.raises(ValueError, match=r"seed was 0 and is 1; optimizer.lr was 0.0002 and is 0.001") as refusal:
        run(earlier, "steps=6", "seed=1", "optimizer.lr=1e-3", "checkpoint_every=1")
    assert "checkpoint_every" not in str(refusal.value)
    assert files(earlier) == before


def test_another_precision_is_refused_before_anything_starts(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model.dtype=auto` is float32 here, and bfloat16 on a machine with a GPU."""
    monkeypatch.setattr(assemble, "working_dtype", lambda *_: torch.bfloat16)
    config = compose("train", [f"output={earlier}", *SMALL, "steps=6"], TrainConfig)
    with pytest.raises(ValueError, match=r"weights were torch.float32 and are torch.bfloat16 here"):
        program.prepare(config)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "run", "steps=4", "checkpoint_every=1", "keep_checkpoints=2")
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["latest", "step-000003", "step-000004"]


def test_a_checkpoint_is_of_its_step_while_the_training_goes_on(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writing waits until the next step has changed the weights; what it writes are those of before."""
    later, save = threading.Event(), training_state.save_checkpoint

    def patient(*args: object, **options: object) -> object:
        assert later.wait(60)
        return save(*args, **options)  # type: ignore[arg-type]

    learn = program.Learner.learn_shares

    def learn_and_tell(self: program.Learner, shares: object, step: int) -> object:
        learned = learn(self, shares, step)  # type: ignore[arg-type]
        if step == 2:  # the third
            later.set()
        return learned

    monkeypatch.setattr(training_state, "save_checkpoint", patient)
    monkeypatch.setattr(program.Learner, "learn_shares", learn_and_tell)
    run(tmp_path / "run", "steps=3", "checkpoint_every=2")
    for file in ("model.safetensors", "training/__0_0.distcp"):
        written, expected = (folder / "checkpoints" / "step-000002" / file for folder in (tmp_path / "run", undisturbed))
        assert written.read_bytes() == expected.read_bytes()


def test_every_random_state_comes_back() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(())), random.gauss(0, 1)]  # noqa: NPY002

    draw()
    states = random_states()
    first = draw()
    assert draw() != first
    restore_random_states(states)
    assert draw() == first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(number: int, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = [sys.executable, "-m", "bcr.train", f"output={output}", *SMALL, "steps=6", f"threads={torch.get_num_threads()}"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    told, error = process.communicate(timeout=100)
    assert (process.returncode, error) == (0, "")
    steps = len(metrics.read_text().splitlines())
    assert 1 <= steps < 6
    assert f"stopped after step {steps} of 6; resume=auto goes on from there." in told
    assert os.readlink(output / "checkpoints" / "latest") == f"step-{steps:06d}"
    run(output, "steps=6", f"threads={torch.get_num_threads()}")
    assert files(output) == files(undisturbed)


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    """`make torture` has twenty."""
    assert torture.torture(tmp_path, kills=3, seed=1) == ["sampling", "grading", "learning"]
