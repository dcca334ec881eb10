"""Seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """`with clock("sampling"): ...` sets `clock.seconds["seconds_sampling"]`, the wall time of that block when it last ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[f"seconds_{phase}"] = time.perf_counter() - begun
