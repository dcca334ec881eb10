"""The package imports, and runs on a CPU, where Triton is missing; and it knows nothing of the trainer."""

import os
import subprocess
import sys
from pathlib import Path

import bcr_kernels

ROOT = Path(bcr_kernels.__file__).parent

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # any import of it fails
import torch, bcr_kernels as K
hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
K.linear_logprob(hidden, weight, torch.tensor([0, 1, 2])).logprob.sum().backward()
out = K.linear_policy_loss(
    hidden, weight, torch.tensor([0, 1, 2]), old_logprobs=torch.zeros(3), segment_ids=torch.zeros(3, dtype=torch.int64),
    advantages=torch.ones(1), weights=torch.ones(3), rule=K.LossRule(),
)
out.loss.backward()
assert not any(name == "bcr" or name.startswith("bcr.") for name in sys.modules)
"""


def test_runs_without_triton() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, env=environment)


def test_knows_nothing_of_the_trainer() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert "import bcr\n" not in text
        assert "from bcr." not in text
        assert "from bcr import" not in text


def test_files_stay_small() -> None:
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 310, path.name
