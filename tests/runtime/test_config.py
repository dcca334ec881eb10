"""Every shipped config fits its program, and bad input ends in one sentence and exit code 2, from whatever folder."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bcr.demo import DemoConfig
from bcr.runtime.config import as_plain, compose, config_folder, one_sentence, typed
from bcr.runtime.schema import DifficultyConfig, EvaluateConfig, TrainConfig
from bcr.solve import SolveConfig
from bcr.warmstart import WarmStartConfig

PROGRAMS = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "difficulty": DifficultyConfig,
    "solve": SolveConfig,
    "warmstart": WarmStartConfig,
    "demo": DemoConfig,
}
OPTIONS = {group: sorted(file.stem for file in (config_folder() / group).glob("*.yaml")) for group in ("model", "data", "experiment")}
NEEDED = {"folder": ["model.path=somewhere"], "jsonl": ["data.path=somewhere.jsonl"]}
ASKED = {"solve": ["input=somewhere.jsonl"]}  # what has no default


def composed(name: str, overrides: list[str]) -> DictConfig:
    """The YAML side alone, before it meets its dataclass."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose(name, overrides)


def schema_keys(schema: Any, prefix: str = "") -> set[str]:
    """Dotted names of all fields; Optional sections are entered, elements of lists of sections as `name[]`."""
    keys: set[str] = set()
    for field, kind in get_type_hints(schema).items():
        inside = next((part for part in (kind, *get_args(kind)) if dataclasses.is_dataclass(part)), None)
        name = prefix + field + ("[]" if get_origin(kind) is list else "")
        keys |= schema_keys(inside, f"{name}.") if inside else {prefix + field}
    return keys


def yaml_keys(value: Any, known: set[str], name: str = "") -> set[str]:
    """Dotted names of all leaves; what the schema knows as one field (a mapping of shares, say) is not entered."""
    if isinstance(value, dict) and name not in known:
        return {key for part, inner in value.items() for key in yaml_keys(inner, known, f"{name}.{part}" if name else str(part))}
    if isinstance(value, list) and name not in known:
        return {key for inner in value for key in yaml_keys(inner, known, f"{name}[]")}
    return {name}


def choices(name: str) -> list[list[str]]:
    """Overrides that together select every option of every group that the program's config takes."""
    groups = OmegaConf.load(config_folder() / f"{name}.yaml").get("defaults") or []  # type: ignore[union-attr]
    taken = [str(group) for entry in groups if not isinstance(entry, str) for group in entry if group in OPTIONS]
    return [[f"{group}={option}", *NEEDED.get(option, [])] for group in taken for option in OPTIONS[group]]


@pytest.mark.parametrize("name", PROGRAMS)
def test_yaml_and_dataclass_know_the_same_keys(name: str) -> None:
    known = schema_keys(PROGRAMS[name])
    found: set[str] = set()
    for overrides in [[], *choices(name)]:
        keys = yaml_keys(OmegaConf.to_container(composed(name, overrides)), known)
        found |= {key for key in keys if not any(longer.startswith(f"{key}.") for longer in known)}  # a section that is null says nothing
    assert found == known


@pytest.mark.parametrize(("name", "overrides"), [(name, overrides) for name in PROGRAMS for overrides in [[], *choices(name)]], ids=str)
def test_every_option_composes(name: str, overrides: list[str]) -> None:
    config = compose(name, [*ASKED.get(name, []), *overrides], PROGRAMS[name])
    assert isinstance(config, PROGRAMS[name])
    assert as_plain(config)


def test_the_option_that_is_asked_for_is_the_one_that_comes() -> None:
    config = compose("train", ["model=random", "data=jsonl", "data.path=a b.jsonl", "steps=7", "optimizer.lr=1e-6"], TrainConfig)
    assert config.model.path is None
    assert config.model.random is not None
    assert (config.data.kind, config.data.path, config.steps, config.optimizer.lr) == ("dataset", "a b.jsonl", 7, 1e-6)


@pytest.mark.parametrize(
    ("overrides", "sizes"), [([], [3]), (["bundles.sizes=[1]"], [1]), (["bundles.sizes=[1,2]", "bundles.shares=[1,2]"], [1, 2])]
)
def test_a_mixture_is_replaced_and_not_mixed_with_the_default(overrides: list[str], sizes: list[int]) -> None:
    assert compose("train", overrides, TrainConfig).bundles.sizes == sizes


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stepz=3"], "stepz"),
        (["loss.klip=3"], "klip"),
        (["+loss.klip=3"], "klip"),
        (["steps=many"], "steps: Value 'many' of type 'str' could not be converted to Integer"),
        (["steps=1.5"], "steps: Value '1.5' of type 'float' could not be converted to Integer"),
        (["logging.tensorboard=perhaps"], "logging.tensorboard: Value 'perhaps'"),
        (["optimizer.betas=fast"], "optimizer.betas"),
        (["data=nothing"], "Could not find 'data/nothing' Available options in 'data': aime24"),
        (["model=folder"], "model.path has no default"),
        (["steps"], "steps"),
    ],
)
def test_a_bad_key_or_value_is_named_in_one_line(overrides: list[str], sentence: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as refusal:
        compose("train", overrides, TrainConfig)
    said = one_sentence(refusal.value)
    assert sentence in said
    assert "\n" not in said


def test_a_key_of_the_yaml_that_the_dataclass_lacks_is_refused() -> None:
    config = composed("demo", [])
    OmegaConf.set_struct(config, False)
    config.surprise = 1
    with pytest.raises(OmegaConfBaseException, match="surprise"):
        typed(config, DemoConfig)


def train(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m bcr.train` in another working directory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "bcr.train", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stepz=3"], "stepz"),  # refused by Hydra
        (["steps=many"], "steps: Value 'many'"),  # by the types
        (["bundles.group=1"], "bundles.group is 1"),  # by the program
        (["--multirun", "steps=1,2"], "2 runs"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    result = train(arguments, tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("bcr.train: ")
    assert sentence in line
    assert not (tmp_path / "outputs" / "train").exists()


@pytest.mark.parametrize(("arguments", "expected"), [(["--help"], "bundles:"), (["--cfg", "job", "steps=12345"], "steps: 12345")])
def test_help_and_the_composed_config_are_shown_without_a_run(arguments: list[str], expected: str, tmp_path: Path) -> None:
    result = train(arguments, tmp_path)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
    assert not (tmp_path / "outputs" / "train").exists()
