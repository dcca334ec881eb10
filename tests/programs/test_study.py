"""A study in small: stopped in the middle, started again, and finished; what is done is never done again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bcr.records import Verdict
from bcr.runtime.config import compose, config_folder
from bcr.runtime.schema import TrainConfig
from bcr.study import BASE, MOST_CELLS, CellConfig, Listing, StudyConfig, check_listing, collect, prepare, run
from bcr.study_cell import LETTERS, Measurement, differences, forget_other_run, letters, read_result
from bcr.tasks.arithmetic import ArithmeticProblems

TINY = "['bundles.per_step=1','bundles.group=2','sampling.row_block=8']"
SMALL = ["experiment=quick", "cells=[bcr,same_cap]", "steps=25", "problems=6", "sizes=[1,2]", "roomy=40", "cut_at=[10,30]", "workers=1"]
SMALL += [f"experiment.cells.{name}.overrides={TINY}" for name in ("bcr", "same_cap")]
LISTINGS = sorted(file.stem for file in (config_folder() / "study" / "experiment").glob("*.yaml"))


def study(folder: Path, *overrides: str) -> StudyConfig:
    return compose("study/study", [f"output={folder}", *SMALL, *overrides], StudyConfig)


def stopped(folder: Path, number: int, after: int, group: bool) -> int:
    """Start the study and send it, or with `group` all its processes, a signal once its first cell has taken so many steps; its exit code.

    Nothing of it is left running.
    """
    command = [sys.executable, "-m", "bcr.study", f"output={folder}", *SMALL]
    metrics = folder / "cells" / "bcr" / "seed-0" / "metrics.jsonl"
    hearing = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, preexec_fn=hearing, start_new_session=True) as started:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < after:
            assert started.poll() is None
            time.sleep(0.02)
        (os.killpg if group else os.kill)(started.pid, number)
        code = started.wait(timeout=100)
    until = time.monotonic() + 10
    while (left := alive(started.pid)) and time.monotonic() < until:
        time.sleep(0.05)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left
    return code


def alive(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, _, its_session, *_ = file.read_text().rpartition(")")[2].split()
            found += [int(file.parent.name)] if int(its_session) == session and state != "Z" else []
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Stopped by SIGTERM, which the study alone hears, before it comes to its end."""
    folder = tmp_path_factory.mktemp("study")
    assert stopped(folder, signal.SIGTERM, after=5, group=False) == 143
    cut_off = folder / "cells" / "bcr" / "seed-0"
    assert (folder / "cells" / BASE / "seed-0" / "result.json").exists()
    assert not (cut_off / "result.json").exists()
    assert list((cut_off / "checkpoints").glob("step-*"))
    run(prepare(study(folder)))
    return folder


def test_it_goes_on_where_it_was_stopped(folder):
    cell = folder / "cells" / "bcr" / "seed-0"
    assert "resuming from" in (cell / "log.txt").read_text()
    assert [json.loads(line)["step"] for line in (cell / "metrics.jsonl").read_text().splitlines()] == list(range(1, 26))
    assert not (cell / "checkpoints").exists(), "weights are not kept"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_terminal_or_a_scheduler_may_tell_all_processes(number, code, tmp_path):
    """And the study hands it on all the same: to a cell that is no second signal, which would end it at once."""
    assert stopped(tmp_path, number, after=3, group=True) == code
    cell = tmp_path / "cells" / "bcr" / "seed-0"
    steps = len((cell / "metrics.jsonl").read_text().splitlines())
    assert os.readlink(cell / "checkpoints" / "latest") == f"step-{steps:06d}"
    assert "Traceback" not in (cell / "log.txt").read_text()


def test_every_cell_leaves_what_the_analysis_needs(folder):
    results = collect(prepare(study(folder)))
    assert list(results) == [BASE, "bcr", "same_cap"]
    asked = ArithmeticProblems("heldout")
    for name, (result,) in results.items():
        assert result["difficulties"] == [asked[index].difficulty for index in range(6)]
        for size in ("1", "2"):
            cell = result["sizes"][size]
            assert len(cell["outcomes"]) == len(cell["tokens"]) == 6
            assert cell["outcomes"].count("c") / 6 == pytest.approx(cell["accuracy"])
            assert sum(cell["tokens"]) / 6 == pytest.approx(cell["tokens_per_problem"])
            assert set(cell["cut"]) == {"10", "30"}
        if name == BASE:
            assert result["training"] is None
        else:
            steps = [json.loads(line) for line in (folder / "cells" / name / "seed-0" / "metrics.jsonl").read_text().splitlines()]
            assert result["training"]["steps"] == 25
            assert result["training"]["tokens"] == pytest.approx(sum(step["tokens_sampled"] for step in steps))


def test_what_is_done_is_not_done_again_and_a_list_may_grow(folder):
    assert prepare(study(folder)).pending == []
    grown = prepare(study(folder, "seeds=[0,1]", f"+experiment.cells.another={{title: another, overrides: {TINY}}}", "cells=null"))
    assert [(cell.name, cell.seed) for cell in grown.pending if cell.name not in ("grpo",)] == [
        ("another", 0), ("bcr", 1), ("same_cap", 1), ("another", 1),
    ]  # fmt: skip


def test_a_result_of_other_settings_is_refused_or_replaced(folder):
    with pytest.raises(ValueError, match=r"problems was 6 and is 12.*redo=true replaces it"):
        prepare(study(folder, "problems=12"))
    cell = next(cell for cell in prepare(study(folder)).cells if cell.name == "bcr")
    result = read_result(cell)
    assert result is not None
    assert differences(result, cell) == []
    del result["config"]["reward.kind"]  # as a result from before this setting existed
    assert differences(result, cell) == []
    assert result["config"].pop("optimizer.share_prompts") is False  # younger than the committed results, which had no other layout
    assert differences(result, cell) == []
    result["config"]["optimizer.lr"] = 1.0
    assert differences(result, cell) == ["optimizer.lr was 1.0 and is 0.0002"]


def test_an_unfinished_run_older_than_a_setting_is_gone_on_with(folder, tmp_path):
    cell = next(cell for cell in prepare(study(folder)).cells if cell.name == "bcr")
    cell = replace(cell, config=replace(cell.config, output=str(tmp_path)))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    older = OmegaConf.structured(cell.config)
    settings = OmegaConf.to_container(older)
    del settings["parallel"]["samplers"]
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "config.yaml")
    forget_other_run(cell)
    assert (tmp_path / "metrics.jsonl").exists()
    settings["optimizer"]["lr"] = 1.0
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "config.yaml")
    forget_other_run(cell)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_letters_tell_every_verdict():
    assert len(set(LETTERS.values())) == len(Verdict)
    assert letters([]) == ""
    assert LETTERS[Verdict.CORRECT] == "c"


def test_the_listed_cells_are_trainings_of_matched_problems_a_step(tmp_path):
    """And a cell is the same training in every list, for results are shared between experiments by name."""
    seen: dict[str, TrainConfig] = {}
    for name in LISTINGS:
        checked = prepare(compose("study/study", [f"experiment={name}", f"output={tmp_path}", "seeds=[0]"], StudyConfig))
        assert checked.listing.name == name
        assert len(checked.listing.cells) == len(checked.cells) - 1
        for cell in checked.cells:
            assert seen.setdefault(cell.name, cell.config) == cell.config
    for name, config in seen.items():
        problems = config.bundles.per_step * sum(config.bundles.sizes) / len(config.bundles.sizes)
        assert 35 <= problems <= 36, name
        assert config.bundles.group == 8


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("cells=[bcr,kimo]", "cells has 'kimo'; quick has bcr, same_cap, grpo"),
        ("problems=7", "problems is 7; it must be a multiple of every N, here of 2"),
        ("seeds=[]", "there must be at least one of each"),
        ("workers=0", "workers is 0"),
        ("seeds=[0,1,0]", r"seeds is \[0, 1, 0\]; each may stand there once"),
    ],
)
def test_bad_input_is_one_sentence(override, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        prepare(study(tmp_path, override))


def test_sizes_and_budgets_are_measured_once_and_in_order(tmp_path):
    """The analysis takes the first N for the smallest, and the first budget for the tightest."""
    cell = prepare(study(tmp_path, "sizes=[2,1,2]", "cut_at=[30,10]")).cells[0]
    assert cell.measurement == Measurement(6, (1, 2), 40, (10, 30))


def test_a_comparison_names_cells():
    with pytest.raises(ValueError, match=r"compare has \['base', 'x'\]"):
        check_listing(Listing(compare=[["base", "x"]]))


def test_a_list_has_at_most_25_cells():
    cells = {f"cell_{k}": CellConfig() for k in range(MOST_CELLS)}
    check_listing(Listing(cells=cells))
    with pytest.raises(ValueError, match=r"^experiment.cells has 26 cells; more than 25 are several experiments\.$"):
        check_listing(Listing(cells={**cells, "one_more": CellConfig()}))
