"""Seconds by phase, and on CUDA the most memory that a phase took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """`with clock("sampling"): ...` sets `clock.seconds["seconds_sampling"]`, the wall time of that block when it last ran.

    Where CUDA is, also `clock.peaks["peak_mb_sampling"]`: the most that tensors took at once in it, those that were there before included.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        on_cuda = torch.cuda.is_available()
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        yield
        self.seconds[f"seconds_{phase}"] = time.perf_counter() - begun
        if on_cuda:
            self.peaks[f"peak_mb_{phase}"] = torch.cuda.max_memory_allocated() / 2**20
