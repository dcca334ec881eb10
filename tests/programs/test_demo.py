"""The demo in small: every part leaves its figures, an interrupt leaves those of the finished parts, and the runs are what train makes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bcr import demo, train
from bcr.demo import PARTS, DemoConfig, costs, prepare, run
from bcr.runtime.config import compose
from bcr.runtime.schema import TrainConfig

SMALL = ["steps=1", "problems=12", "sizes=[1,3]", "roomy=16", "shared=40"]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "runs" / "old").mkdir(parents=True)
    run(prepare(compose("demo", [f"output={folder}", *SMALL], DemoConfig)))
    return folder


def test_every_part_leaves_its_figures(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["complete"] is True
    assert list(summary["runs"]) == ["base", *PARTS]
    for name, told in summary["runs"].items():
        for size in ("1", "3"):
            cell = summary[name][size]
            assert cell["problems"] == 12
            assert 0 <= cell["accuracy"] <= 1
            assert cell["tokens_per_problem"] > 0
        assert told["folder"] == (None if name == "base" else f"runs/{name}")
        assert name == "base" or len(lines(whole / told["folder"] / "metrics.jsonl")) == 1
    assert summary["shared_budget"]["sizes"] == [1, 3]
    assert len(summary["shared_budget"]["base"]) == len(summary["shared_budget"]["bcr"]) == 2
    assert (summary["hardest"]["cap"], summary["hardest"]["operations"]) == (22, 4)
    assert summary["said"]
    assert (whole / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert b"</html>" in (whole / "report.html").read_bytes()


def test_the_time_left_was_estimated_before_every_part_and_all_declared_work_was_done(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert len(summary["estimates"]) == 1 + len(PARTS)
    left = [seconds for _, seconds in summary["estimates"]]
    assert left[0] == pytest.approx(sum(costs(prepare(compose("demo", [f"output={whole / 'again'}", *SMALL], DemoConfig)))), rel=0.05)
    assert 0 < left[-1] < left[0]


def test_kept_rollouts_can_be_laid_side_by_side(whole):
    kept = lines(whole / "evaluations.jsonl")
    for size, count in ((1, 12), (3, 4)):
        asked = {
            name: [[problem["question"] for problem in line["problems"]] for line in kept if (line["run"], line["size"]) == (name, size)]
            for name in ("base", *PARTS)
        }
        assert len(asked["base"]) == count
        assert all(questions == asked["base"] for questions in asked.values())
    assert all(segment["advantage"] is None for line in kept for segment in line["segments"])


def test_its_runs_are_those_of_train_to_the_last_bit(whole, tmp_path):
    overrides = ["experiment=arithmetic_tight_budget", "steps=1", "device=cpu", f"output={tmp_path}"]
    train.train(train.prepare(compose("train", overrides, TrainConfig)))
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "runs" / "bcr_tight" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_the_quick_demo_replaces_an_earlier_one(tmp_path):
    stale = [tmp_path / "runs" / "grpo" / "metrics.jsonl", tmp_path / "evaluations.jsonl"]
    stale[0].parent.mkdir(parents=True)
    for file in stale:
        file.write_text("{}\n")
    run(prepare(compose("demo", [f"output={tmp_path}", "parts=[bcr]", *SMALL, "problems=6"], DemoConfig)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["runs"]) == ["base", "bcr"]
    assert not stale[0].exists()
    assert {line["run"] for line in lines(stale[1])} == {"base", "bcr"}
    assert (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(("until", "finished"), [("1/6", []), ("grow", ["base", "bcr"])])
def test_ctrl_c_leaves_a_summary_and_a_report_of_what_is_done(until, finished, tmp_path):
    """Interrupted while the base is measured, and in the middle of the second training run."""
    command = [sys.executable, "-u", "-m", "bcr.demo", f"output={tmp_path}", *SMALL]
    if finished:
        command += ["parts=[bcr,grpo]"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as started:
        assert started.stdout is not None
        assert any(until in line for line in started.stdout)
        started.send_signal(signal.SIGINT)
        said, error = started.communicate(timeout=100)
    assert started.returncode == 130
    assert error.strip() == "bcr.demo: interrupted."
    assert "Stopped early" in said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] is False
    assert [name for name in ("base", *PARTS) if name in summary] == finished
    assert b"</html>" in (tmp_path / "report.html").read_bytes()
    assert not finished or (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("parts=[bcr,kimi]", "parts has 'kimi'; there are bcr, grpo"),
        ("parts=[grpo]", "parts lacks 'bcr'"),
        ("problems=0", "problems is 0"),
    ],
)
def test_bad_input_is_one_sentence(override, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        prepare(compose("demo", [f"output={tmp_path}", override], DemoConfig))


def test_what_the_console_says_of_a_recipe_is_what_the_recipe_does():
    """The sentences and the cap of the comparison name numbers that stand in configs/experiment/."""
    config = {name: demo.training_config(DemoConfig(), name) for name in PARTS}
    assert config["bcr"].bundles.sizes == [1, 2, 3, 4, 5, 6]
    assert f"share {config['bcr'].bundles.budget} tokens" in PARTS["bcr"].sentence
    tight, capped = config["bcr_tight"].bundles, config["same_cap"].bundles
    assert f"share {tight.budget} tokens" in PARTS["bcr_tight"].sentence
    assert (tight.sizes, capped.sizes, tight.budget, capped.budget) == ([3], [1], 3 * 22, 22)
    assert 3 * tight.per_step == capped.per_step
    assert (config["penalty"].reward.coefficient, config["penalty"].reward.length) == (2.0, 40)
