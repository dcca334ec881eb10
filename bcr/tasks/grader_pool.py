"""Judging many answers at once, in processes that can be killed: see `GraderPool`."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from bcr.records import Verdict
from bcr.tasks.grader_worker import FORK, HELLO, KILL, ORDER, VERDICTS, encode
from bcr.tasks.grading import grade_simple

Pair = tuple[str, str]

CACHE_SIZE = 50_000  # pairs
MIN_MEMORY_MB = 256  # the interpreter with sympy takes about 100
GRACE_S = 1.0  # a worker whose pool has vanished ends itself so long after its deadline
START_LIMIT_S = 120.0
STOP_LIMIT_S = 10.0
MAX_FAILED_STARTS = 5
START_TEMPLATE = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from bcr.tasks.grader_worker import main; main()"


class Worker:
    """The pool's end of one worker process."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pid: int | None = None  # unknown until it says hello
        self.pair: Pair | None = None  # what it is judging
        self.dispatched_at = 0.0

    @property
    def idle(self) -> bool:
        return self.pid is not None and self.pair is None

    def dispatch(self, pair: Pair) -> None:
        self.pair, self.dispatched_at = pair, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it is dead, which the selector tells next
            self.connection.sendall(encode(*pair))


class GraderPool:
    """Grades lists of (gold, answer) with `workers` processes; a context manager.

    What `grade_simple` decides is answered in the calling process. The rest goes to worker processes, one pair at a time each: a worker
    that takes longer than `deadline_s` seconds from dispatch is killed (TIMEOUT), one that dies is an ERROR, and both are
    replaced in milliseconds by a fork of a template process. `memory_mb` caps the address space of each worker (on Linux); an answer that
    runs into it is never CORRECT, but mostly WRONG or UNPARSED, for the libraries catch the error themselves.
    No process is started before the first pair that needs one. When the calling process ends, however it ends, so do all of these.

    `replaced` counts the workers lost so far, `slowest_s` is the longest time from a dispatch to its verdict. One thread grades at a time;
    others wait. Raises ValueError for arguments out of range and for use after closing, RuntimeError where no worker can be started.

    >>> with GraderPool(workers=2, deadline_s=5.0) as pool:
    ...     pool.grade([("1/2", "0.5"), ("x^2-1", "(x-1)(x+1)"), ("7", None)])
    [<Verdict.CORRECT: 'correct'>, <Verdict.CORRECT: 'correct'>, <Verdict.UNANSWERED: 'unanswered'>]
    """

    def __init__(self, workers: int, deadline_s: float = 5.0, memory_mb: int = 1024) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}: at least 1 is needed")
        if not 0 < deadline_s < 3600:
            raise ValueError(f"deadline_s is {deadline_s}: it must be above 0 and below 3600 seconds")
        if memory_mb < MIN_MEMORY_MB:
            raise ValueError(f"memory_mb is {memory_mb}: a worker needs at least {MIN_MEMORY_MB}")
        self.size, self.deadline_s, self.memory_mb = workers, deadline_s, memory_mb
        self.replaced = 0
        self.slowest_s = 0.0
        self._cache: OrderedDict[Pair, Verdict] = OrderedDict()
        self._lock = threading.Lock()
        self._template: subprocess.Popen[bytes] | None = None
        self._template_works = False  # it has forked a worker
        self._control: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._workers: list[Worker] = []
        self._failed_starts = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def grade(self, pairs: Sequence[tuple[str, str | None]]) -> list[Verdict]:
        """One verdict per (gold, answer), in order; see `bcr.tasks.grading.grade` for what each means."""
        with self._lock:
            if self._closed:
                raise ValueError("this GraderPool is closed: open a new one")
            verdicts = [grade_simple(gold, answer) for gold, answer in pairs]
            left = [
                (gold, answer) for (gold, answer), verdict in zip(pairs, verdicts, strict=True) if verdict is None and answer is not None
            ]
            judged = self._recall(left)
            judged |= self._judge([pair for pair in dict.fromkeys(left) if pair not in judged])
            return [
                judged[gold, answer or ""] if verdict is None else verdict for (gold, answer), verdict in zip(pairs, verdicts, strict=True)
            ]

    def close(self) -> None:
        """End every process of this pool."""
        self._closed = True
        self._stop()
        self._selector.close()

    def _recall(self, pairs: list[Pair]) -> dict[Pair, Verdict]:
        known = {pair: self._cache[pair] for pair in pairs if pair in self._cache}
        for pair in known:
            self._cache.move_to_end(pair)
        return known

    def _remember(self, pair: Pair, verdict: Verdict) -> None:
        """Keep what is true of the pair. A timeout or a dead worker may be the machine's fault: those are tried again."""
        if verdict in (Verdict.TIMEOUT, Verdict.ERROR):
            return
        self._cache[pair] = verdict
        if len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)

    def _judge(self, pairs: list[Pair]) -> dict[Pair, Verdict]:
        """The verdicts of the workers on pairs that are all different."""
        if not pairs:
            return {}
        waiting = deque(pairs)
        verdicts: dict[Pair, Verdict] = {}
        try:
            self._start()
            self._collect(waiting, patience_s=0.0)  # workers that died while they had nothing to do
            while len(verdicts) < len(pairs):
                for worker in self._workers:
                    if waiting and worker.idle:
                        worker.dispatch(waiting.popleft())
                for pair, verdict in self._collect(waiting, self._patience_s()):
                    verdicts[pair] = verdict
                    self._remember(pair, verdict)
        except BaseException:  # an interrupt above all: workers still at work must not answer the next call
            self._stop()
            raise
        return verdicts

    def _patience_s(self) -> float:
        """Seconds to the nearest deadline, or how long a process may take to start where none is at work."""
        busy = [worker.dispatched_at + self.deadline_s for worker in self._workers if worker.pair]
        return max(0.0, min(busy) - time.monotonic()) if busy else START_LIMIT_S

    def _collect(self, waiting: deque[Pair], patience_s: float) -> list[tuple[Pair, Verdict]]:
        """Wait for replies, deaths or a deadline; what became of the pairs concerned. Those that lost the template go back to `waiting`."""
        ready = self._selector.select(patience_s)
        if not ready and patience_s == START_LIMIT_S:
            raise RuntimeError(f"no grader worker was ready after {START_LIMIT_S:.0f} seconds")
        if any(key.data is None for key, _ in ready):
            self._restart(waiting)
            return []
        outcomes = [outcome for key, _ in ready if (outcome := self._read(key.data))]
        for worker in [worker for worker in self._workers if worker.pair and time.monotonic() - worker.dispatched_at >= self.deadline_s]:
            outcomes.append(self._settle(worker, Verdict.TIMEOUT))
            self._replace(worker)
        return outcomes

    def _read(self, worker: Worker) -> tuple[Pair, Verdict] | None:
        """Take what a worker says: its hello, a verdict, or nothing any more."""
        try:
            data = worker.connection.recv(HELLO.size)
        except ConnectionResetError:  # it died before it had read its pair
            data = b""
        if not data:
            self._failed_starts += worker.pid is None
            if self._failed_starts > MAX_FAILED_STARTS:
                raise RuntimeError(f"{self._failed_starts} grader workers died before they were ready; memory_mb is {self.memory_mb}")
            outcome = self._settle(worker, Verdict.ERROR) if worker.pair else None
            self._replace(worker)
            return outcome
        if worker.pid is None:
            (worker.pid,) = HELLO.unpack(data)
            self._failed_starts, self._template_works = 0, True
            return None
        return self._settle(worker, VERDICTS[data[0]])

    def _settle(self, worker: Worker, verdict: Verdict) -> tuple[Pair, Verdict]:
        assert worker.pair is not None
        pair, worker.pair = worker.pair, None
        self.slowest_s = max(self.slowest_s, time.monotonic() - worker.dispatched_at)
        return pair, verdict

    def _start(self) -> None:
        """Start the template and order its workers, unless they are there."""
        if self._template is not None:
            return
        self._control, far_end = socket.socketpair()
        self._selector.register(self._control, selectors.EVENT_READ, None)
        arguments = [
            far_end.fileno(),
            os.getpid(),
            self.memory_mb,
            self.deadline_s + GRACE_S,
            json.dumps([os.path.abspath(p) for p in sys.path]),
        ]
        with far_end:
            self._template = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", "-c", START_TEMPLATE, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[far_end.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is for the trainer, which then closes the pool
                env={**os.environ, "PYTHONHASHSEED": "0"},  # the order of sympy's sets, and with it its verdicts, must not vary
            )
        for _ in range(self.size):
            self._add_worker()

    def _restart(self, waiting: deque[Pair]) -> None:
        """The template died: start again, with what its workers were judging first in line."""
        assert self._template is not None
        if not self._template_works:
            raise RuntimeError(
                f"the grader's template process could not start (exit status {self._template.wait()}): its error is printed above"
            )
        waiting.extendleft(worker.pair for worker in self._workers if worker.pair)
        self.replaced += len(self._workers)
        self._stop()
        self._start()

    def _stop(self) -> None:
        """End the template, which kills the workers as it goes."""
        for worker in list(self._workers):
            self._drop(worker)
        if self._control is not None:
            self._selector.unregister(self._control)
            self._control.shutdown(socket.SHUT_RDWR)  # unlike close, this also reaches the other end where a fork of ours holds a copy
            self._control.close()
            self._control = None
        if self._template is not None:
            try:
                self._template.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._template.kill()
                self._template.wait()
            self._template, self._template_works = None, False

    def _order(self, kind: bytes, pid: int = 0, fds: Sequence[int] = ()) -> None:
        assert self._control is not None
        with contextlib.suppress(BrokenPipeError):  # the template is dead: the selector tells next, and everything is started again
            socket.send_fds(self._control, [ORDER.pack(kind, pid)], fds)

    def _add_worker(self) -> None:
        near_end, far_end = socket.socketpair()
        with far_end:
            self._order(FORK, fds=[far_end.fileno()])
        worker = Worker(near_end)
        self._workers.append(worker)
        self._selector.register(near_end, selectors.EVENT_READ, worker)

    def _replace(self, worker: Worker) -> None:
        """Have a worker killed, if it is not dead already, and another one forked."""
        self._drop(worker)
        self.replaced += 1
        if worker.pid is not None:
            self._order(KILL, worker.pid)
        self._add_worker()

    def _drop(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.connection)
        worker.connection.close()
