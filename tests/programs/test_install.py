"""Both packages installed as a user would, each in a clean environment: as wheels, and bcr editable too.

A clean environment here is a new venv that holds exactly what the package declares, and what that declares, taken over from the
environment of the tests as links. pip then resolves the wheel against it without an index: a dependency that is used and not declared
makes the programs fail, one that is declared and not there makes pip fail.
"""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
KEPT_OUT = shutil.ignore_patterns(".*", "outputs", "build", "shared", "*.egg-info", "__pycache__")


def declared(file: Path) -> list[Requirement]:
    return [Requirement(line) for line in tomllib.loads(file.read_text())["project"]["dependencies"]]


def closure(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """What is installed here of these requirements and of all that they require on this platform."""
    found: dict[str, Distribution] = {}
    open_ones = list(requirements)
    while open_ones:
        requirement = open_ones.pop()
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[requirement.name] = distribution(requirement.name)
        extras = ["", *requirement.extras]
        for line in found[requirement.name].requires or []:
            below = Requirement(line)
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in extras):
                open_ones.append(Requirement(line.split(";")[0]))
    return found


def clean_environment(folder: Path, requirements: Iterable[Requirement]) -> Path:
    """A venv without pip, with links to the requirements' files. Returns its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=100)
    (site,) = folder.glob("lib/python*/site-packages")
    for dist in closure(requirements).values():
        for name in {file.parts[0] for file in dist.files or []} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(dist.locate_file(name))))
    return folder / "bin" / "python"


def run(*command: object, folder: Path, timeout: float = 280) -> str:
    """Run without a trace of this checkout in the environment; the standard output."""
    lean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=lean, timeout=timeout, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def pip(python: Path, *arguments: object, folder: Path) -> str:
    return run(sys.executable, "-m", "pip", "--python", python, *arguments, folder=folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree: builds leave things behind."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=KEPT_OUT))


@pytest.fixture(scope="module")
def wheels(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for tree in (source, source / "kernels"):
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, tree, folder=folder)
    return folder


def check_programs(python: Path, folder: Path) -> None:
    """Every program composes its config, one trains, and the report is made, in a folder that is not the checkout."""
    for program in ("train", "evaluate", "warmstart", "demo"):
        assert "seed: 0" in run(python, "-m", f"bcr.{program}", "--cfg", "job", folder=folder)
        assert "python -m bcr." in run(python, "-m", f"bcr.{program}", "--help", folder=folder)
    assert "name: rivals" in run(python, "-m", "bcr.study", "--cfg", "job", folder=folder)
    small = ["steps=1", "bundles.per_step=1", "bundles.budget=20", "sampling.row_block=8"]
    run(python, "-m", "bcr.train", "output=run", *small, folder=folder)
    assert (folder / "run" / "checkpoints" / "step-000001" / "README.md").exists()
    run(python, "-m", "bcr.report", "run", folder=folder)
    assert (folder / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_wheels_hold_what_they_should_and_nothing_else(wheels):
    (wheel,) = wheels.glob("bcr-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"bcr", "bcr_kernels"}
    for file in (ROOT / "configs").rglob("*.yaml"):
        assert f"bcr/configs/{file.relative_to(ROOT / 'configs')}" in names
    assert {"bcr_kernels/__init__.py", "bcr/assets/arithmetic-base/model.safetensors"} <= set(names)
    assert {"bcr/analysis/report/page.html", "bcr/analysis/report/study.html"} <= set(names)
    (wheel,) = wheels.glob("bcr_kernels-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"bcr_kernels"}
    assert "bcr_kernels/_triton/kernels.py" in names


@pytest.mark.slow
def test_the_wheel_of_bcr_works_with_what_it_declares_alone(wheels, tmp_path):
    python = clean_environment(tmp_path / "venv", declared(ROOT / "pyproject.toml"))
    (wheel,) = wheels.glob("bcr-*.whl")
    pip(python, "--isolated", "install", "--quiet", "--no-index", wheel, folder=tmp_path)
    where = run(python, "-c", "import bcr, bcr_kernels; print(bcr.__file__, bcr_kernels.__file__)", folder=tmp_path)
    assert where.count(str(tmp_path / "venv")) == 2
    check_programs(python, tmp_path)


@pytest.mark.slow
def test_an_editable_install_works_and_follows_the_tree(source, tmp_path):
    python = clean_environment(tmp_path / "venv", declared(ROOT / "pyproject.toml"))
    pip(python, "install", "--quiet", "--no-deps", "--editable", source, folder=tmp_path)
    pip(python, "check", folder=tmp_path)
    assert run(python, "-c", "import bcr; print(bcr.__file__)", folder=tmp_path).startswith(str(source))
    check_programs(python, tmp_path)


@pytest.mark.slow
def test_the_wheel_of_the_kernels_passes_its_own_tests_without_bcr(wheels, tmp_path):
    tools = [Requirement(name) for name in ("pytest", "pytest-timeout", "hypothesis", "numpy")]
    python = clean_environment(tmp_path / "venv", [*declared(ROOT / "kernels" / "pyproject.toml"), *tools])
    (wheel,) = wheels.glob("bcr_kernels-*.whl")
    pip(python, "--isolated", "install", "--quiet", "--no-index", wheel, folder=tmp_path)
    absent = "import importlib.util as u; assert not any(map(u.find_spec, ('bcr', 'transformers', 'hydra', 'matplotlib')))"
    run(python, "-c", absent, folder=tmp_path)
    shutil.copytree(ROOT / "tests" / "kernels", tmp_path / "kernels", ignore=KEPT_OUT)  # away from the tests of bcr and their conftest
    (tmp_path / "kernels" / "pytest.ini").write_text("[pytest]\nmarkers = slow\npythonpath = .\n")
    tests = [
        "-q",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "--ignore=test_aot.py",
    ]  # the compile gate looks at the same files either way
    said = run(python, "-m", "pytest", *tests, folder=tmp_path / "kernels")
    assert " passed" in said
    assert "skipped" not in said


@pytest.mark.parametrize("file", ["pyproject.toml", "kernels/pyproject.toml"])
def test_a_mac_is_asked_for_nothing_that_only_linux_has(file):
    """triton has no wheel for macOS, and liger-kernel needs triton."""
    mac = {"sys_platform": "darwin", "platform_system": "Darwin", "extra": ""}
    wanted = {one.name for one in declared(ROOT / file) if one.marker is None or one.marker.evaluate(mac)}
    assert wanted.isdisjoint({"triton", "liger-kernel", "flash-attn"})
    assert "torch" in wanted


@pytest.mark.slow
def test_training_and_report_run_where_triton_is_missing(tmp_path):
    """As on macOS: any import of triton, liger-kernel or flash-attn fails."""
    hidden = "import sys; sys.modules.update(dict.fromkeys(('triton', 'liger_kernel', 'flash_attn')))\n"
    small = "output=run steps=1 device=cpu bundles.per_step=1 bundles.budget=20 sampling.row_block=8"
    train = f"import runpy; sys.argv = 'train.py {small}'.split(); runpy.run_module('bcr.train', run_name='__main__')\n"
    imports = "import bcr.evaluate, bcr.warmstart, bcr.demo, bcr.report\n"
    code = hidden + imports + train + "from pathlib import Path; print(bcr.report.write_report(Path('run')))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, timeout=200, capture_output=True)
    assert (tmp_path / "run" / "report.html").exists()
