"""The console of the demo: lines as things happen, above one bar for the whole of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bcr.runtime.progress import seconds_left, spoken


class DemoConsole:
    """A context manager. `total` is the declared cost of everything; `advance` says what of it is done."""

    def __init__(self, total: float, parts: int) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.total, self.done, self.parts, self.part_number = total, 0.0, parts, 0
        self.begun = time.perf_counter()
        self.estimates: list[tuple[float, float]] = []  # at the start of each part: seconds so far, seconds thought to be left
        text = TextColumn("{task.description}, about {task.fields[left]} left")
        self.progress = Progress(text, BarColumn(), console=self.console, transient=True)
        self.bar = self.progress.add_task("", total=total, left="?")

    def __enter__(self) -> DemoConsole:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.begun

    @property
    def left(self) -> float:
        return seconds_left(self.total, self.done, self.elapsed)

    def say(self, text: str) -> None:
        self.console.print(text)

    def part(self, title: str, sentence: str) -> None:
        """A heading, with what comes now and how long everything will still take."""
        self.part_number += 1
        self.estimates.append((round(self.elapsed, 1), round(self.left, 1)))
        self.progress.update(self.bar, description=title)
        self.say(f"\n[bold]{self.part_number}/{self.parts} {title}[/] [dim](about {spoken(self.left)} left)[/]\n{sentence}")

    def advance(self, cost: float) -> None:
        self.done += cost
        self.progress.update(self.bar, completed=self.done, left=spoken(self.left))

    def within(self, cost: float) -> Callable[[int, int], None]:
        """For what reports `(finished, total)` itself: moves the bar, but leaves `done` to the `advance` that follows."""
        return lambda finished, total: self.progress.update(self.bar, completed=self.done + cost * finished / total)

    def training(self, steps: int, cost: float, every: int) -> TrainingLines:
        """What `bcr.train.train` takes for its console; `cost` is that of all steps."""
        return TrainingLines(self, steps, cost, every)


class TrainingLines:
    """One line every `every` steps, and the first and the last."""

    def __init__(self, demo: DemoConsole, steps: int, cost: float, every: int) -> None:
        self.demo, self.steps, self.cost, self.every = demo, steps, cost, every

    def __enter__(self) -> TrainingLines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def step(self, number: int, values: Mapping[str, Any]) -> None:
        self.demo.advance(self.cost / self.steps)
        if number == 1 or number % self.every == 0 or number == self.steps:
            measures = f"accuracy {values['accuracy']:6.1%}   tokens/problem {values['tokens_per_problem']:5.1f}   unanswered"
            self.demo.say(
                f"  step {number:3d} of {self.steps}   {measures} {values['unanswered']:4.0%}   [dim]about {spoken(self.demo.left)} left[/]"
            )

    def warn(self, message: str) -> None:
        self.demo.say(f"  [yellow]warning: {message}[/]")
