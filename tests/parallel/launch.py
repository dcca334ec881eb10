"""Functions on several ranks, forked from a server that has everything imported: what torchrun does, at a tenth of a second a start."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from bcr.parallel.ranks import Ranks


def on_ranks(size: int, function: Callable[..., Any], *args: Any, nodes: int = 1, timeout_s: float = 120, join: bool = True) -> list[Any]:
    """What `function(ranks, *args)` returns on each of `size` ranks (of `nodes` equal machines), by rank. AssertionError where one raises.

    The function must be importable, its arguments and result must pickle. `join=False`: it is `function(*args)` and joins by itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bcr.train"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    started = []
    for rank, (_, far) in enumerate(pipes):
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % (size // nodes), "LOCAL_WORLD_SIZE": size // nodes}
        environment = {**{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = context.Process(target=child, args=(environment, far, function, args, join))
        process.start()
        far.close()
        started.append(process)
    try:
        results = [near.recv() if near.poll(timeout_s) else ("silent", None) for near, _ in pipes]
    except EOFError:
        results = [("left", None)]
    finally:
        for process in started:
            process.join(10)
            process.kill()
    assert all(state == "returned" for state, _ in results), "\n".join(f"{state}: {value}" for state, value in results)
    return [value for _, value in results]


def child(environment: dict[str, str], pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...], join: bool) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        if not join:
            pipe.send(("returned", function(*args)))
            return
        ranks = Ranks.start("cpu", timeout_s=60)
        pipe.send(("returned", function(ranks, *args)))
        ranks.close()
    except BaseException:
        pipe.send(("raised", traceback.format_exc()))
        raise
