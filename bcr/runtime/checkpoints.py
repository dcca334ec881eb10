"""The checkpoints of a run: written beside the training, the last k kept, `latest` pointing at the newest whole one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from bcr.runtime.checkpoint import sync

LATEST = "latest"


class Checkpoints:
    """Writes `step-000003` and the like into `folder`, one at a time, in a thread of its own. A context manager that waits for the last.

    What it writes must be a snapshot: the training goes on meanwhile. A failure (OSError on a full disk) is raised by the next call of
    `save` or `check`, or at the end; the checkpoints before it stand.

    On several ranks each writes its part of a checkpoint; the `first` puts it together and looks after the folder.
    """

    def __init__(self, folder: Path, keep: int | None, first: bool = True) -> None:
        self.folder, self.keep, self.first = folder, keep, first
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()

    def save(self, step: int, write: Callable[[Path], object]) -> Path:
        """Have `write(folder)` make the checkpoint of this step; then `latest` moves and what is too old goes."""
        self.wait()
        folder = self.folder / f"step-{step:06d}"
        self._writing = self._thread.submit(self._write, folder, write)
        return folder

    @property
    def newest(self) -> Path | None:
        """The checkpoint that `latest` points at."""
        link = self.folder / LATEST
        return self.folder / os.readlink(link) if link.is_symlink() else None

    def check(self) -> None:
        """Raise what went wrong in the background, if something did."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, folder: Path, write: Callable[[Path], object]) -> None:
        write(folder)
        if not self.first:
            return
        point_latest_to(folder)
        if self.keep is not None:
            older = [other for other in step_folders(self.folder) if other.name <= folder.name]
            for too_old in older[: -self.keep]:
                remove(too_old)


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, damaged ones included."""
    return sorted(folder.glob("step-*"))


def point_latest_to(folder: Path) -> None:
    """Move the link `latest`, in one operation that a kill cannot split."""
    temporary = folder.with_name(f".{LATEST}.partial")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name, target_is_directory=True)
    os.replace(temporary, folder.with_name(LATEST))
    sync(folder.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint; renamed first, so that a kill leaves no half of one under its name."""
    doomed = folder.rename(folder.with_name(f".{folder.name}.partial"))
    shutil.rmtree(doomed)


def tidy(folder: Path) -> None:
    """Put right what a kill left behind: put back what was set aside for a checkpoint that never came, delete what is half written."""
    for previous in folder.glob(".step-*.previous"):
        place = folder / previous.name.removeprefix(".").removesuffix(".previous")
        shutil.rmtree(previous) if place.exists() else previous.rename(place)
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial)
    (folder / f".{LATEST}.partial").unlink(missing_ok=True)
