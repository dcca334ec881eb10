"""Which memory pool and stream graphs are captured with, on stand-ins for torch's graphs: the rules are those of its allocator."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bcr.sampler.graphs import CudaCapture, Graphs


class Graph:
    """Its pool is the one that its capture was given, or a new one."""

    pools: list[object] = []  # noqa: RUF012 (that have been asked for, None for a new one)

    def pool(self) -> object:
        return self.own

    def replay(self) -> None: ...


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Those that were captured on."""
    used: list[object] = []

    @contextmanager
    def capture(graph: Any, *, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        Graph.pools.append(pool)
        graph.own = pool or object()
        used.append(stream)
        yield

    monkeypatch.setattr(Graph, "pools", [])
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(CUDAGraph=Graph, graph=capture, Stream=object))
    return used


def test_a_pool_is_shared_while_one_of_its_graphs_lives(streams: list[object]) -> None:
    graphs = Graphs(CudaCapture())
    for key in (1, 2, 3):
        graphs.run(key, lambda: None)
    assert Graph.pools[0] is None
    assert Graph.pools[1] is Graph.pools[2] is not None
    graphs.clear()
    for key in (1, 2):
        graphs.run(key, lambda: None)
    assert Graph.pools[3] is None  # torch refuses one whose graphs are all gone
    assert Graph.pools[4] not in (None, Graph.pools[1])


def test_every_sampler_captures_on_a_stream_of_its_own(streams: list[object]) -> None:
    captures = [CudaCapture(), CudaCapture()]
    replays = [capture(lambda: None) for capture in [*captures, *captures]]
    assert len(replays) == 4
    assert streams[0] is streams[2] is not streams[1]
    assert streams[1] is streams[3]
