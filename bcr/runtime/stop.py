"""SIGTERM and Ctrl-C: finish the step, write a checkpoint, leave with exit code 0."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

from bcr.runtime.config import first_here

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 5.0  # seconds in which torchrun hands on to its processes what a terminal or a scheduler has sent to them already


class StopRequest:
    """A context manager under which the first SIGTERM or SIGINT sets `asked` instead of ending the process. The second interrupts.

    Of the ranks of one machine the first speaks.

    Call it to know: `stop()` is True from the first signal on.
    """

    def __init__(self) -> None:
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
        under_torchrun = "LOCAL_RANK" in os.environ
        if self.asked is not None:
            if under_torchrun and time.monotonic() - self._since < ECHO:
                return
            raise KeyboardInterrupt
        self.asked, self._since = signal.Signals(number).name, time.monotonic()
        if first_here():
            print(f"{self.asked}: this step is finished and written, then the run ends. Once more ends it at once.", flush=True)
