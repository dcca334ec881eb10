"""Captured steps: which batch sizes exist, and how the work for one is captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakSet

import torch

Work = Callable[[], None]


def padded_rows(rows: int) -> int:
    """The size of the graph that serves so many rows: four sizes an octave, so that at most a fifth of the rows are idle.

    >>> [padded_rows(rows) for rows in (1, 3, 9, 100, 256, 257)]
    [1, 3, 10, 112, 256, 320]
    """
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return -(-rows // step) * step


def most_rows(rows: int) -> int:
    """The rows of the buffers for at most so many: a multiple of 16, with which equal rows get equal bits (`row_attention.py`)."""
    return -(-padded_rows(rows) // 16) * 16


def eager(work: Work) -> Work:
    """No graph: what runs on a CPU, where it exercises the same buffers and padding."""
    return work


class CudaCapture:
    """capture(work) -> replay. All share one memory pool: they run one after the other, and what they leave lies in static buffers.

    After the last of them is gone a new one starts a new pool: torch's allocator refuses a pool that no graph holds any more while
    something of it is in use, as the matrix library's workspace of the capturing stream is. That stream is this object's own: in newer
    versions of torch a graph that goes takes its stream's workspace along, and another sampler's graphs must not be working in it.
    """

    def __init__(self) -> None:
        self.alive: WeakSet[Any] = WeakSet()
        self.stream: Any = None

    def __call__(self, work: Work) -> Work:
        self.stream = self.stream or torch.cuda.Stream()
        pool = next((graph.pool() for graph in self.alive), None)
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # a checkpoint may be written meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode=mode):
            work()
        self.alive.add(graph)
        return graph.replay


class Graphs:
    """run(key, work): the first time eagerly, which compiles what must be compiled, and captured for the times that follow.

    `work` depends on `key`, on the contents of static buffers and on nothing else. Weights may change in place.
    """

    def __init__(self, capture: Callable[[Work], Work]) -> None:
        self.capture = capture
        self.held: dict[Hashable, Work] = {}

    def run(self, key: Hashable, work: Work) -> None:
        replay = self.held.get(key)
        if replay is not None:
            replay()
            return
        work()
        self.held[key] = self.capture(work)

    def clear(self) -> None:
        """Forget them all: a buffer that they use is gone."""
        self.held.clear()
