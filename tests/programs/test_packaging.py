"""Every package of the tree is listed for installation, and the light ones stay light. See test_install.py for installing itself."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_of_the_tree_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "bcr").rglob("*.py")}
    found |= {".".join(file.parent.relative_to(ROOT / "kernels").parts) for file in (ROOT / "kernels" / "bcr_kernels").rglob("*.py")}
    assert listed == found | {"bcr.configs"}


def test_importing_the_tasks_brings_no_torch():
    lean = "import sys; import bcr.tasks.judging, bcr.tasks.grader_pool, bcr.tasks.arithmetic; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", lean], check=True, timeout=100)
