"""The cells of the study in the embedded world: they ask as many problems a step as BCR, and each runs."""

import json
import math

import pytest

from bcr.runtime.config import compose, config_folder
from bcr.runtime.schema import TrainConfig
from bcr.train import prepare, train

RECIPES = sorted(file.stem for file in (config_folder() / "experiment").glob("arithmetic_*.yaml"))
MIXED = ("arithmetic_mixed_n", "arithmetic_mixed_n_long")  # 42 on average, 35 with bundles.per_step=10
PROBLEMS = 36  # a step, as 12 bundles of 3
SMALL = ["steps=2", "device=cpu", "threads=1", "bundles.per_step=2", "bundles.group=4"]


@pytest.mark.parametrize("name", RECIPES)
def test_problems_a_step_are_matched(name: str) -> None:
    bundles = compose("train", [f"experiment={name}"], TrainConfig).bundles
    assert bundles.group == 8
    problems = bundles.per_step * sum(bundles.sizes) / len(bundles.sizes)
    assert problems == (42 if name in MIXED else PROBLEMS)


def test_the_documents_name_every_recipe() -> None:
    table = (config_folder().parent / "docs" / "recipes.md").read_text()
    assert [name for name in RECIPES if f"`{name}`" not in table] == []


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in MIXED])
def test_every_rival_runs(tmp_path, name: str) -> None:
    train(prepare(compose("train", [f"experiment={name}", f"output={tmp_path}", *SMALL], TrainConfig)))
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(math.isfinite(step["loss"]) and step["tokens_per_problem"] <= 130 for step in steps)
    assert any(step["updated"] == 1.0 for step in steps)
