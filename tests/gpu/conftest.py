"""Tests here need CUDA and are skipped without it; `make gpu` runs them. They share inputs and checks with `tests/kernels`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bcr.runtime.host import cores

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # kernel_cases


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True, scope="module")
def every_core() -> Iterator[None]:
    """The oracles are float64 on the host, up to 300 x 1,536 x 151,936."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    yield
    torch.set_num_threads(before)
