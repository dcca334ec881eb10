"""Every command in the README and the docs is one that works: its program exists, its config composes, and its data is checked."""

import re
import shlex
from pathlib import Path

import pytest

from bcr import demo, difficulty, evaluate, solve, train, warmstart
from bcr.runtime.config import compose
from bcr.runtime.schema import DifficultyConfig, EvaluateConfig, TrainConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    "train": (TrainConfig, train.prepare),
    "evaluate": (EvaluateConfig, evaluate.prepare),
    "difficulty": (DifficultyConfig, difficulty.prepare),
    "warmstart": (warmstart.WarmStartConfig, warmstart.prepare),
    "solve": (solve.SolveConfig, solve.prepare),
    "demo": (demo.DemoConfig, demo.prepare),
}


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
    (checkpoint / "step-000060").symlink_to(ROOT / "bcr" / "assets" / "arithmetic-base")


@pytest.mark.parametrize("command", commands(r"-m bcr\.[^\n`]*"))
def test_every_program_line_passes_its_own_checks(command, outputs):
    words = shlex.split(command.removeprefix("-m bcr."), comments=True)
    schema, prepare = PROGRAMS[words[0]]
    overrides = [word if "=" in word else f"input={word}" for word in words[1:] if not word.startswith("[key=")]
    elsewhere = ["output=new"] if words[0] == "train" else []
    prepare(compose(words[0], [*overrides, *elsewhere], schema))


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
