"""Every command in the README and the docs is one that works: its program exists, its config composes, and its data is checked.

The slow tests run each of them too, in small. What needs a GPU has to come as far as the question whether there is one.
"""

import doctest
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

from bcr import demo, difficulty, evaluate, plan, solve, study, train, warmstart
from bcr.report import write_report
from bcr.runtime.config import compose
from bcr.runtime.schema import DifficultyConfig, EvaluateConfig, TrainConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "kernels" / "README.md"]
PROGRAMS = {
    "train": (TrainConfig, train.prepare, train.train),
    "evaluate": (EvaluateConfig, evaluate.prepare, evaluate.run),
    "difficulty": (DifficultyConfig, difficulty.prepare, difficulty.run),
    "plan": (plan.PlanConfig, plan.prepare, plan.run),
    "warmstart": (warmstart.WarmStartConfig, warmstart.prepare, warmstart.run),
    "solve": (solve.SolveConfig, solve.prepare, solve.run),
    "demo": (demo.DemoConfig, demo.prepare, demo.run),
    "study": (study.StudyConfig, study.prepare, study.run),
}
CONFIGS = {"plan": "train", "study": "study/study"}  # planning takes a training's config
SMALL = {  # what makes a run short without changing what it does
    "train": ["steps=1", "bundles.per_step=1", "bundles.group=2", "sampling.row_block=8", "threads=1", "output=new"],
    "evaluate": ["problems=6", "sampling.row_block=8", "threads=1"],
    "plan": [],
    "difficulty": ["problems=6", "sampling.row_block=8", "threads=1"],
    "warmstart": ["stages=[{steps:1,lr:1e-3,sizes:[1]}]", "tokens_per_step=300", "threads=1"],
    "solve": ["n=1", "sampling.row_block=8", "threads=1"],
    "demo": ["steps=1", "problems=12", "rival_problems=12", "sizes=[1,3]", "threads=1"],
}
ELSEWHERE = "device=cuda|bcr.report|bcr.results|bcr.study"  # lines that need a GPU, and those that have tests of their own
TORCHRUN_LINES = r"torchrun --nproc_per_node=\d [^\n`]*"
PROGRAM_LINES, SCRIPT_LINES = r"(?<!nproc_per_node=\d )-m bcr\.[^\n`]*", r"python (?:-m pytest )?(?!-m)[\w/.]+\.?[^\n`]*"


def commands(pattern: str) -> list[str]:
    """What stands in the documents, comments cut off."""
    return sorted({match.split(" #")[0].strip(" `") for file in DOCUMENTS for match in re.findall(pattern, file.read_text())})


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """A folder that holds what the documents speak of: a trained checkpoint and a file of problems."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.jsonl").write_text('{"problem": "What is 2 + 3?", "answer": "5"}\n' * 9)
    checkpoint = tmp_path / "outputs" / "train" / "checkpoints"
    checkpoint.mkdir(parents=True)
    (tmp_path / "outputs" / "train" / "metrics.jsonl").write_text("")
    (checkpoint / "step-000060").symlink_to(ROOT / "bcr" / "assets" / "arithmetic-base")


def overrides_of(words: list[str]) -> list[str]:
    return [word if "=" in word else f"input={word}" for word in words[1:] if not word.startswith("[key=")]


@pytest.mark.parametrize("command", commands(PROGRAM_LINES))
def test_every_program_line_passes_its_own_checks(command, outputs):
    words = shlex.split(command.removeprefix("-m bcr."), comments=True)
    if words[0] == "report":
        assert write_report(Path(words[1])).exists() or words[1] == "FOLDER"
        return
    if words[0] == "results":
        assert (ROOT / words[1]).exists()
        return
    schema, prepare, _ = PROGRAMS[words[0]]
    config = compose(CONFIGS.get(words[0], words[0]), [*overrides_of(words), *(["output=new"] if words[0] == "train" else [])], schema)
    if "device=cuda" in words and not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no GPU"):  # the last check before the model
            prepare(config)
    else:
        prepare(config)


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in commands(PROGRAM_LINES) if not re.search(ELSEWHERE, line)])
def test_every_program_line_runs(command, outputs, capsys):
    words = shlex.split(command.removeprefix("-m bcr."), comments=True)
    schema, prepare, run = PROGRAMS[words[0]]
    run(prepare(compose(CONFIGS.get(words[0], words[0]), [*overrides_of(words), *SMALL[words[0]]], schema)))
    assert capsys.readouterr().out.strip(), "a program says what it has done"


@pytest.mark.slow
@pytest.mark.parametrize("line", commands(TORCHRUN_LINES))
def test_every_line_with_torchrun_runs(line, outputs):
    words = [*shlex.split(line, comments=True)[1:], *SMALL["train"]]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *words], check=True, timeout=200)


def test_the_worked_examples_in_the_documents_hold():
    for file in DOCUMENTS:
        assert doctest.testfile(str(file), module_relative=False).failed == 0, file.name


def test_the_drawings_are_whole_and_named():
    for file in (ROOT / "docs" / "images").glob("*.svg"):
        drawing = xml.etree.ElementTree.parse(file).getroot()
        assert drawing.get("aria-label"), file.name
        assert not re.search(r"(href|src)=", file.read_text()), file.name
        assert any(f"images/{file.name}" in document.read_text() for document in DOCUMENTS), f"{file.name} is shown nowhere"


def test_the_drawn_advantages_are_those_of_the_worked_example():
    drawn = re.findall(r">([+\u2212]0\.\d\d)<", (ROOT / "docs" / "images" / "advantages.svg").read_text())
    numbers = re.findall(r"^    (?:rollout|problem) \[(.*)\]$", (ROOT / "docs" / "concepts.md").read_text(), re.MULTILINE)
    by_row = [numbers[row + scope] for row in range(3) for scope in (0, 3)]  # the drawing goes row by row, both scopes side by side
    expected = [float(number) for row in by_row for number in row.split(",")]
    assert [float(number.replace("\u2212", "-")) for number in drawn] == expected


@pytest.mark.parametrize("command", commands(SCRIPT_LINES))
def test_every_script_and_folder_of_tests_exists(command):
    words = shlex.split(command)[1:]
    assert (ROOT / (words[2] if words[0] == "-m" else words[0])).exists()


@pytest.mark.parametrize("command", commands(r"make [a-z-]+(?= |`|\n|\))"))
def test_every_make_target_exists(command):
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", commands(r"-m bench\.\w+"))
def test_every_benchmark_exists(command):
    assert (ROOT / (command.removeprefix("-m ").replace(".", "/") + ".py")).exists()


def test_links_lead_somewhere():
    for file in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text()):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_no_command_in_the_documents_goes_untested():
    """An indented line that begins like a command is one of those above, or installs something (see test_install.py)."""
    known = (PROGRAM_LINES, TORCHRUN_LINES, SCRIPT_LINES, r"make [a-z-]+", r"-m bench\.\w+", r"pip install")
    for file in DOCUMENTS:
        for line in re.findall(r"^ {4}((?:python|torchrun|make|pip|bash|\w+=\S+ python) .*)$", file.read_text(), re.MULTILINE):
            assert any(re.search(pattern, line) for pattern in known), f"{file.name}: {line}"
