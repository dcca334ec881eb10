"""Seconds by phase, and the most memory that a phase took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bcr.runtime import resident


class Clock:
    """`with clock("sampling"): ...` sets `clock.seconds["seconds_sampling"]`, the wall time of that block when it last ran.

    And `clock.peaks["peak_mb_sampling"]`, MiB: on CUDA the most that tensors took there at once in that block; else the highest
    resident set of this process in it, and nothing where the system does not tell. What was there before is included. Phases do not nest.
    `device`: where the run computes.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.on_cuda = torch.device(device).type == "cuda"
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        told = self.on_cuda or resident.restart_peak()
        begun = time.perf_counter()
        yield
        self.seconds[f"seconds_{phase}"] = time.perf_counter() - begun
        if told:
            self.peaks[f"peak_mb_{phase}"] = torch.cuda.max_memory_allocated() / 2**20 if self.on_cuda else resident.peak_mb()
