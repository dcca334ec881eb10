"""How a run ends before its time: by itself, with a sentence; or by SIGTERM and Ctrl-C.

A training then finishes the step, writes a checkpoint and leaves with exit code 0. A study hands both on to its cells. Other programs
are interrupted by Ctrl-C and ended by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 5.0  # seconds in which a parent hands on to its processes what a terminal or a scheduler has sent to them already


class RunStopped(Exception):
    """A run ends itself, with one sentence for its user. What it has written stands."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, in a program that takes it as it takes Ctrl-C."""


class StopRequest:
    """A context manager under which the first SIGTERM or SIGINT sets `asked` instead of ending the process. The second interrupts.

    Of the ranks of one machine the first speaks. `handed_on`: the parent hands signals on, so that one may come twice within `ECHO`
    seconds and is still one; None: where torchrun is the parent.

    Call it to know: `stop()` is True from the first signal on.
    """

    def __init__(self, handed_on: bool | None = None) -> None:
        self.handed_on = "LOCAL_RANK" in os.environ if handed_on is None else handed_on
        self.asked: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.asked is not None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            if self.handed_on and time.monotonic() - self._since < ECHO:
                return
            raise KeyboardInterrupt
        self.asked, self._since = signal.Signals(number).name, time.monotonic()
        if first_here():
            print(f"{self.asked}: this step is finished and written, then the run ends. Once more ends it at once.", flush=True)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, as Ctrl-C raises KeyboardInterrupt. Of the main thread."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def first_here() -> bool:
    """Whether this is the first, or the only, process of a run on this machine: what all find alike, one of them says."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
