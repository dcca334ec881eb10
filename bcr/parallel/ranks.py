"""The processes of one run, as torchrun starts them: which one this is, what they do together, and how all leave when one fails."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from bcr.runtime.host import choose_device
from bcr.runtime.stop import RunStopped

Value = TypeVar("Value")

FAILED, LOOK_EVERY = "bcr/failed", 1.0  # the key under which a failing rank tells the others, and the seconds between their looks


class Ranks:
    """This process among `size`, on `device`. Every method is a collective: all ranks call it, in the same order.

    A context manager that ends them together: where one rank fails inside it, its traceback is printed and all the others leave within
    seconds, wherever they wait. What several ranks find wrong alike (`agreeing`, RunStopped) is no such failure.
    """

    def __init__(self, device: torch.device | str = "cpu", rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.device = torch.device(device)
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._leaving = threading.Event()
        self._store: dist.Store | None = None
        self._watcher: threading.Thread
        self.timeout = timedelta(minutes=30)
        self.group: dist.ProcessGroup | None = None  # None: of all processes
        self.background: dist.ProcessGroup | None = None  # of a second thread, whose collectives must not mix with those of the first

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Ranks:
        """One process; every collective is the identity."""
        return cls(device)

    @classmethod
    def start(cls, device: str = "auto", timeout_s: float = 1800.0) -> Ranks:
        """What torchrun's environment says; alone without it. gloo on a CPU; on CUDA NCCL for tensors there and gloo for everything else.

        `timeout_s`: how long a rank waits for the others in a collective, so longer than sampling may take one rank more than another,
        and with ranks that only sample longer than they take, or the others to learn.
        ValueError for a device that is not there, and for an environment that lacks what torchrun sets.
        """
        chosen = choose_device(device)
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls.alone(chosen)
        for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            if name not in os.environ:
                raise ValueError(f"WORLD_SIZE is {size} and {name} is not set; start several processes with torchrun, or unset WORLD_SIZE.")
        rank, local_rank, local_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        if chosen.type == "cuda":
            if local_size > torch.cuda.device_count():
                raise ValueError(
                    f"torchrun started {local_size} processes here and there are {torch.cuda.device_count()} GPUs; start one each."
                )
            chosen = torch.device("cuda", local_rank)
            torch.cuda.set_device(chosen)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        ranks = cls(chosen, rank, size, local_rank, local_size)
        ranks.timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, timeout=ranks.timeout)
        ranks.background = dist.new_group(backend="gloo", timeout=ranks.timeout)
        ranks._watch()
        return ranks

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0

    def first_ones(self, count: int) -> Ranks:
        """The first `count` ranks among themselves, for collectives of their own; every rank calls it, and the others only know its `size`.

        Failing stays a matter of all.
        """
        if count == self.size:
            return self
        some = Ranks(self.device, self.rank, count, self.local_rank, self.local_size)
        some.timeout = self.timeout
        if count > 1:
            some.group, some.background = self.subgroup(range(count)), self.subgroup(range(count), "gloo")
        return some

    def subgroup(self, members: Iterable[int], backend: str | None = None) -> dist.ProcessGroup:
        """A process group of some ranks; every rank calls it. None: the backend of all."""
        return dist.new_group(list(members), timeout=self.timeout, backend=backend)

    def mesh(self, shard_size: int | None = None) -> DeviceMesh:
        """All ranks as ("shard",), or as ("replicate", "shard") where `shard_size` is less than all. Of some ranks all of the run call it.

        None: the ranks of one machine shard, and machines replicate (HSDP); where these are only some of the last machine's, groups of the
        largest size at which none stretches over two machines. ValueError for a `shard_size` that does not divide `size`.
        """
        of_a_machine = self.size if self.size <= self.local_size else math.gcd(self.size, self.local_size)
        shard = of_a_machine if shard_size is None else shard_size
        if shard < 1 or self.size % shard:
            raise ValueError(f"parallel.shard_size is {shard}; it must divide the number of ranks that learn, which is {self.size}.")
        if shard == self.size:
            return DeviceMesh(self.device.type, range(self.size), mesh_dim_names=("shard",))
        return DeviceMesh(self.device.type, torch.arange(self.size).view(-1, shard), mesh_dim_names=("replicate", "shard"))

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value (anything that pickles), by rank, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, self.group)
        return found

    def gather_first(self, value: Value) -> list[Value]:
        """The same, but on the first rank alone; [] on the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, found, group=self.group)
        return found or []

    def broadcast(self, value: Value) -> Value:
        """The first rank's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group)
        return box[0]

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the ranks, in float64, by name; a rank may lack a name. The same bits on every rank and in any order of ranks."""
        if self.size == 1:
            return dict(values)
        found = self.gather(dict(values))
        columns = {name: [one.get(name, 0.0) for one in found] for name in dict.fromkeys(name for one in found for name in one)}
        # `fsum` raises where infinities of both signs meet, as in the sums of an update that is to be skipped
        return {name: math.fsum(column) if all(map(math.isfinite, column)) else sum(column) for name, column in columns.items()}

    def max(self, values: Mapping[str, float]) -> dict[str, float]:
        """Maxima over the ranks that have the name; a NaN anywhere is a NaN."""
        found = self.gather(dict(values))
        columns = {name: [one[name] for one in found if name in one] for name in dict.fromkeys(name for one in found for name in one)}
        return {name: math.nan if any(map(math.isnan, column)) else max(column) for name, column in columns.items()}

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.gather(flag))

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """What one rank finds wrong inside (ValueError, OSError) is raised on all at the end, and the process group is closed.

        There must be no collective inside, for a rank that has found something wrong does not come to it.
        """
        error: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as caught:
            error = caught
        except BaseException as caught:
            self._fail(caught)
            raise
        said = [one for one in self.gather(None if error is None else str(error)) if one is not None]
        if said:
            self.close()
            raise error or ValueError(said[0])

    @contextmanager
    def failing_as_one(self) -> Iterator[None]:
        """What is raised inside ends the run on all ranks at once, before anything around it can wait for one of them."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not isinstance(error, RunStopped):  # that one all ranks raise alike
            self._fail(error)
        self.close()

    def close(self) -> None:
        """Wait for the others and end the process group."""
        if self._store is not None and not self._leaving.is_set():
            self.gather(None)
            self._leaving.set()
            self._watcher.join()
            dist.destroy_process_group()

    def _fail(self, error: BaseException) -> None:
        """Tell the others, and print the traceback at once, before anybody else has a reason to speak; then SystemExit.

        Errors for which the program has a sentence of its own are not printed. Whoever comes second, mostly for want of the first, leaves
        in silence.
        """
        if self._store is None or self._leaving.is_set():
            return
        self._leaving.set()
        try:
            first = self._store.add(FAILED, 1) == 1
        except RuntimeError:  # the store is gone, and with it the run
            first = False
        if not first:
            time.sleep(2 * LOOK_EVERY)  # the first one is to end first
            os._exit(1)
        if isinstance(error, Exception) and not isinstance(error, OSError | MemoryError):
            text = "".join(traceback.format_exception(error))
            sys.stderr.write(f"rank {self.rank} of {self.size} failed, which stops the run:\n{text}")
            sys.stderr.flush()
            raise SystemExit(1) from None

    def _watch(self) -> None:
        """Look every second whether another rank has failed and leave: from a thread, for the main one may be stuck in a collective."""
        self._store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store = self._store.clone()  # type: ignore[union-attr]

        def look() -> None:
            while not self._leaving.wait(LOOK_EVERY):
                try:
                    failed = store.check([FAILED])
                except RuntimeError:
                    failed = True
                if failed and not self._leaving.is_set():
                    time.sleep(LOOK_EVERY)
                    os._exit(1)

        self._watcher = threading.Thread(target=look, name="watch", daemon=True)
        self._watcher.start()
