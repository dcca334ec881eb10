"""What is installed is what is in the tree: every package is listed, the configs and the shipped base go along, nothing else does."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_package_of_the_tree_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "bcr").rglob("*.py")}
    found |= {".".join(file.parent.relative_to(ROOT / "kernels").parts) for file in (ROOT / "kernels" / "bcr_kernels").rglob("*.py")}
    assert listed == found | {"bcr.configs"}


def test_the_package_runs_without_triton_and_importing_the_tasks_brings_no_torch():
    hidden = "import sys; sys.modules['triton'] = None; import bcr.train, bcr.evaluate, bcr.demo"
    subprocess.run([sys.executable, "-c", hidden], check=True, timeout=100)
    lean = "import sys; import bcr.tasks.judging, bcr.tasks.grader_pool, bcr.tasks.arithmetic; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", lean], check=True, timeout=100)


@pytest.mark.slow
def test_the_wheel_holds_configs_and_base_and_runs_from_another_folder(tmp_path):
    """Installed beside the dependencies of this environment, but not from this checkout."""
    source = tmp_path / "source"  # a build leaves its own copy of the packages behind, so it gets a tree of its own
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source], check=True, timeout=280)
    (wheel,) = tmp_path.glob("bcr-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"bcr/configs/train.yaml", "bcr/configs/experiment/arithmetic_mixed_n.yaml", "bcr_kernels/__init__.py"} <= set(names)
    assert "bcr/assets/arithmetic-base/model.safetensors" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"bcr", "bcr_kernels"}
    site = tmp_path / "site"
    install = ["--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([sys.executable, "-m", "pip", "install", *install], check=True, timeout=100)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import bcr, runpy; assert bcr.__file__.startswith({str(site)!r}); "
    arguments = "sys.argv = ['train.py', 'output=run', 'steps=1', 'bundles.per_step=1', 'bundles.budget=20']; "
    run = code + arguments + "runpy.run_module('bcr.train', run_name='__main__')"
    subprocess.run([sys.executable, "-c", run], check=True, cwd=tmp_path, timeout=200)
    assert (tmp_path / "run" / "checkpoints" / "step-000001" / "config.json").exists()
