"""The live console of a training run: one line a step, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

COLUMNS = (  # heading, metric, format
    ("acc %", "accuracy", "{:5.1%}"),
    ("tok/prob", "tokens_per_problem", "{:8.1f}"),
    ("trunc", "truncated", "{:5.0%}"),
    ("unans", "unanswered", "{:5.0%}"),
    ("unpars", "unparsed", "{:6.0%}"),
    ("no sig", "without_signal", "{:6.0%}"),
    ("entropy", "entropy", "{:7.3f}"),
    ("grad", "grad_norm", "{:6.2f}"),
    ("|dlogp| mean", "dlogprob_mean", "{:12.1e}"),
    ("max", "dlogprob_max", "{:7.1e}"),
    ("sample", "seconds_sampling", "{:5.2f}s"),
    ("grade", "seconds_grading", "{:4.2f}s"),
    ("learn", "seconds_learning", "{:4.2f}s"),
)


class StepConsole(Protocol):
    """Who is told of every step of a training run: a context manager around the loop."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...

    def step(self, number: int, values: Mapping[str, Any]) -> None:
        """Step `number` (from 1) is done; `values` are its metrics and timings."""
        ...

    def warn(self, message: str) -> None:
        """Something looks wrong; `message` says what, and what may help."""
        ...


class Silence:
    """The console of a rank that does not speak."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None: ...

    def step(self, number: int, values: Mapping[str, Any]) -> None: ...

    def warn(self, message: str) -> None: ...


class TrainingConsole:
    """A context manager; call `step` once for every step."""

    def __init__(self, steps: int, title: str, detail: str = "", done: int = 0) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.steps, self.title, self.detail, self.done, self.begun = steps, title, detail, done, time.perf_counter()
        text = "{task.completed}/{task.total} steps, about {task.fields[left]} left"
        self.progress = Progress(TextColumn(title), BarColumn(), TextColumn(text), console=self.console, transient=True)
        self.task = self.progress.add_task(title, total=steps, completed=done, left="?")

    def __enter__(self) -> TrainingConsole:
        self.console.print(self.title, style="bold")
        if self.detail:
            self.console.print(self.detail, style="dim")
        self.console.print(" step  " + "  ".join(heading.rjust(width(pattern)) for heading, _, pattern in COLUMNS), style="dim")
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", style="bold yellow")

    def step(self, number: int, values: Mapping[str, Any]) -> None:
        cells = [pattern.format(values[name]).rjust(len(heading)) for heading, name, pattern in COLUMNS]
        self.console.print(f"{number:5d}  " + "  ".join(cells))
        left = (time.perf_counter() - self.begun) / (number - self.done) * (self.steps - number)
        self.progress.update(self.task, completed=number, left=f"{left:.0f} s")


def width(pattern: str) -> int:
    return len(pattern.format(0.0))
