"""The training program on ranks: the same run for any number of them, resumed bit for bit, stopped and failing as one."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from bcr import train as program
from bcr.model import load_pretrained
from bcr.runtime.config import compose
from bcr.runtime.schema import TrainConfig
from bcr.train import main, prepare
from tests.parallel.launch import on_ranks
from tests.parallel.torture import torture

SMALL = [
    *("device=cpu", "threads=1", "resume=auto", "bundles.per_step=3", "bundles.group=4", "bundles.sizes=[1,2]", "bundles.budget=null"),
    *("bundles.budget_per_problem=25", "sampling.row_block=8", "optimizer.warmup_steps=4", "steps=6", "checkpoint_every=3"),
]


def run(output: str, overrides: list[str]) -> None:
    """The program's body."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    sys.stdout = (Path(output).parent / "said.txt").open("a")
    main(prepare(compose("train", [f"output={output}", *SMALL, *overrides], TrainConfig)))
    sys.stdout.close()


def train(ranks: int, output: Path, *overrides: str) -> Path:
    on_ranks(ranks, run, str(output), list(overrides), join=False)
    return output


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def files(output: Path) -> dict[str, bytes]:
    """What a resumed run must have in common with an undisturbed one. (Cards name the output folder; timings tell the time.)"""
    kept = [*output.glob("*.jsonl"), *(output / "checkpoints" / os.readlink(output / "checkpoints" / "latest")).glob("**/*")]
    changing = ("timings.jsonl", "README.md", ".metadata", "state.json", "checksums.sha256")
    return {str(file.relative_to(output)): file.read_bytes() for file in kept if file.is_file() and file.name not in changing}


def close(left: dict, right: dict, tolerance: float) -> None:
    """Every measure but those of the difference between sampler and learner, which is nothing but rounding."""
    for name, value in left.items():
        if name == "loss":  # a sum of advantages that is 0 but for rounding
            assert abs(value - right[name]) < 1e-6
        elif value is None:  # the mean of nothing
            assert right[name] is None
        elif not name.startswith(("dlogprob_m", "mismatch_kl")):
            assert right[name] == pytest.approx(value, rel=tolerance), name


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(1, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(2, tmp_path_factory.mktemp("two") / "run")


def cut_off(run: Path, place: Path) -> Path:
    """A copy as a kill after the second checkpoint's first bytes would leave it, but for the link."""
    shutil.copytree(run, place / "run", symlinks=True)
    last = os.readlink(run / "checkpoints" / "latest")
    (place / "run" / "checkpoints" / last).rename(place / "run" / "checkpoints" / f".{last}.partial")
    return place / "run"


def test_two_ranks_are_the_same_run(one: Path, two: Path) -> None:
    are_the_same_run(one, two)


def are_the_same_run(one: Path, two: Path) -> None:
    """The rollouts of the first step to the last bit: what is sampled, its verdicts and its advantages."""
    first, second = (read(folder / "metrics.jsonl") for folder in (one, two))
    assert len(first) == len(second)
    close(first[0], second[0], 1e-5)
    for left, right in zip(first, second, strict=True):
        close(left, right, 1e-3)
    left, right = ([record for record in read(folder / "rollouts.jsonl") if record["step"] == 1] for folder in (one, two))
    assert left == right
    weights = [load_pretrained(folder / "checkpoints" / "latest") for folder in (one, two)]
    for left, right in zip(*(model.parameters() for model in weights), strict=True):
        assert (left - right).abs().max() < 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
def test_six_steps_are_three_and_three_more(ranks: int, one: Path, two: Path, tmp_path: Path) -> None:
    """Bit for bit: every line, the model, and every rank's part of the state."""
    undisturbed = {1: one, 2: two}[ranks]
    again = train(ranks, cut_off(undisturbed, tmp_path))
    assert "step-000003, after step 3" in (tmp_path / "said.txt").read_text()
    assert [step["step"] for step in read(again / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert files(again) == files(undisturbed)
    assert len([name for name in files(again) if name.endswith(".distcp")]) == ranks


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_resumes(before: int, after: int, one: Path, two: Path, tmp_path: Path) -> None:
    again = train(after, cut_off({1: one, 2: two}[before], tmp_path))
    assert f"written by {before} ranks, read by {after}" in (tmp_path / "said.txt").read_text()
    for left, right in zip(read(one / "metrics.jsonl"), read(again / "metrics.jsonl"), strict=True):
        close(left, right, 1e-3)


LORA = [
    "steps=4",
    "checkpoint_every=2",
    "optimizer.lr=0.001",
    "loss.kl_coef=0.1",
    "model.lora.rank=3",
]  # which two ranks cannot share evenly


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that train adapters, with the reference of a KL term, by their number of ranks."""
    return {ranks: train(ranks, tmp_path_factory.mktemp("adapters") / "run", *LORA) for ranks in (1, 2)}


def test_adapters_are_the_same_run_on_two_ranks(adapters: dict[int, Path]) -> None:
    """The same files of the same run, and optimizer state for adapters alone."""
    are_the_same_run(adapters[1], adapters[2])
    folders = [run / "checkpoints" / "latest" / "adapter" for run in adapters.values()]
    assert len({(folder / "adapter_config.json").read_text() for folder in folders}) == 1
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert left.keys() == right.keys()
    assert all((left[name] - right[name]).abs().max() < 1e-4 for name in left)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in right.items() if "lora_B" in name), "they have learnt"
    names = FileSystemReader(adapters[2] / "checkpoints" / "latest" / "training").read_metadata().state_dict_metadata
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in names if name.startswith("optimizer.")} == {"lora_A", "lora_B"}


@pytest.mark.parametrize(("before", "after"), [(2, 2), *(pytest.param(*other, marks=pytest.mark.slow) for other in ((1, 2), (2, 1)))])
def test_adapters_resume_on_any_number_of_ranks(before: int, after: int, adapters: dict[int, Path], tmp_path: Path) -> None:
    """On as many as before bit for bit."""
    again = train(after, cut_off(adapters[before], tmp_path), *LORA)
    if before == after:
        assert files(again) == files(adapters[before])
    for left, right in zip(read(adapters[1] / "metrics.jsonl"), read(again / "metrics.jsonl"), strict=True):
        close(left, right, 1e-3)


@pytest.mark.slow
def test_four_ranks_with_one_bundle_and_every_option(tmp_path: Path) -> None:
    """More ranks than bundles; batches that wait; several updates are not possible with one bundle, so two bundles for those."""
    options = ["off_policy.staleness=1", "loss.importance_cap=2", "loss.kl_coef=0.1", "advantage.std_of=batch"]
    for bundles in (["bundles.per_step=1"], ["bundles.per_step=2", "off_policy.updates=2"]):
        place = tmp_path / str(len(bundles))
        single, four = (train(ranks, place / str(ranks) / "run", *options, *bundles) for ranks in (1, 4))
        for left, right in zip(*(read(folder / "metrics.jsonl") for folder in (single, four)), strict=True):
            close(left, right, 2e-3)
        again = train(4, cut_off(four, place), *options, *bundles)
        assert files(again) == files(four)


def sabotaged(output: str, how: str) -> None:
    """On rank 1 something happens while it judges its part of the second step and rank 0 goes on into a collective."""
    calls = itertools.count(1)
    judge = program.judge

    def judge_and_suffer(*args: Any) -> Any:
        if os.environ["RANK"] == "1" and next(calls) == 2:
            (Path(output).parent / "suffered").write_text(str(time.time()))
            if how == "raise":
                raise KeyError("planted")
            os.kill(os.getpid(), {"stop": signal.SIGTERM, "kill": signal.SIGKILL}[how])
        return judge(*args)

    program.judge = judge_and_suffer
    run(output, ["steps=50", "checkpoint_every=50"])


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_rank_that_raises_or_is_killed_stops_all(how: str, tmp_path: Path) -> None:
    """Rank 0 leaves without torchrun's help: in silence after two seconds, or at once where its collective has lost the other side."""
    with pytest.raises(AssertionError, match="left"):
        on_ranks(2, sabotaged, str(tmp_path / "run"), how, join=False)
    assert time.time() - float((tmp_path / "suffered").read_text()) < 30
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 1


def test_a_signal_to_one_rank_ends_the_step_of_all(tmp_path: Path) -> None:
    on_ranks(2, sabotaged, str(tmp_path / "run"), "stop", join=False)
    assert "stopped after step 2 of 50; resume=auto goes on from there." in (tmp_path / "said.txt").read_text()
    assert os.readlink(tmp_path / "run" / "checkpoints" / "latest") == "step-000002"


@pytest.mark.slow
def test_two_kills_under_torchrun_change_nothing(tmp_path: Path) -> None:
    """`make torture RANKS=2` has twenty."""
    assert len(torture(tmp_path, kills=2, seed=0)) == 2


# ---- as torchrun starts it ----------------------------------------------------------------------------------------------------


def torchrun(*arguments: str, module: str = "bcr.train") -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", module, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def children(process: subprocess.Popen) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.05)


@pytest.mark.slow
def test_torchrun_ends_with_0_after_a_signal_to_one_rank(tmp_path: Path) -> None:
    output, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    process = torchrun(f"output={output}", *SMALL, "steps=500", "checkpoint_every=null")
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    os.kill(children(process)[1], signal.SIGTERM)
    said, error = process.communicate(timeout=100)
    assert process.returncode == 0, error
    steps = len(read(metrics))
    assert f"stopped after step {steps} of 500; resume=auto goes on from there." in said
    assert os.readlink(output / "checkpoints" / "latest") == f"step-{steps:06d}"


@pytest.mark.slow
def test_a_failing_rank_stops_all_and_its_traceback_comes_first(tmp_path: Path) -> None:
    """Rank 1 raises in the second step while rank 0 goes on into a collective."""
    process = torchrun(f"output={tmp_path / 'run'}", *SMALL, module="tests.parallel.failing")
    said, error = process.communicate(timeout=100)
    assert process.returncode == 1
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 1
    told = float(next(line for line in said.splitlines() if line.startswith("raising at")).split()[-1])
    assert time.time() - told < 30
    rest = error[error.index("rank 1 of 2 failed, which stops the run:") :].split("Traceback (most recent call last)")[1:]
    assert "KeyError: 'planted'" in rest[0]
    assert error.count("KeyError: 'planted'") == 1
    assert "rank 0 of 2 failed" not in error
    assert "Traceback" not in error[: error.index("rank 1 of 2 failed")]


@pytest.mark.slow
def test_torchrun_hands_on_a_signal_and_bad_input_is_said_once(tmp_path: Path) -> None:
    process = torchrun(f"output={tmp_path / 'never'}", "bundles.sizes=[0]")
    _, error = process.communicate(timeout=100)
    assert error.count("bcr.train: bundles.sizes has N = 0") == 1
    assert "exitcode  : 2" in error
    assert not (tmp_path / "never").exists()
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = torchrun(f"output={tmp_path / 'run'}", *SMALL, "steps=500", "checkpoint_every=null")
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=100)
    steps = len(read(metrics))
    assert f"stopped after step {steps} of 500" in said
    assert os.readlink(tmp_path / "run" / "checkpoints" / "latest") == f"step-{steps:06d}"
