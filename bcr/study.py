"""`python -m bcr.study [key=value ...]`: train and measure a list of cells over several seeds, on all cores, and compare them.

A cell is a name, a title and overrides for `bcr.train`; configs/study/ holds the lists. What is done is never done again, whichever
experiment asked for it, so a study may be stopped at any moment and its list may grow.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import shutil
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bcr.analysis.study import summarise_study
from bcr.analysis.study_tables import overview
from bcr.report import write_report
from bcr.runtime.config import compose, launch
from bcr.runtime.outputs import write_whole
from bcr.runtime.progress import spoken
from bcr.runtime.schema import TrainConfig
from bcr.runtime.stop import ECHO, RunStopped, sigterm_interrupts
from bcr.study_cell import BASE, RESULT, Cell, Measurement, differences, read_result, work

MOST_CELLS = 25
LOOK_EVERY = 1.0  # seconds between two looks at the workers
EVALUATION_STEPS = 10.0  # an evaluation takes about as long as so many steps of training


@dataclass
class CellConfig:
    title: str = ""
    label: str = ""
    overrides: list[str] = field(default_factory=list)


@dataclass
class Listing:
    """A file of configs/study/experiment/. `compare`: pairs (one, control), each a cell or "base"."""

    name: str = ""
    title: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    cells: dict[str, CellConfig] = field(default_factory=dict)
    compare: list[list[str]] = field(default_factory=list)


@dataclass
class StudyConfig:
    experiment: Listing = field(default_factory=Listing)
    output: str = "outputs/study"
    seeds: list[int] | None = None
    cells: list[str] | None = None
    redo: bool = False
    look: bool = False
    steps: int | None = None
    problems: int = 600
    sizes: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 6])
    roomy: int = 130
    cut_at: list[int] = field(default_factory=list)
    workers: int | None = None
    threads: int = 1


@dataclass
class Study:
    """A checked study. `cells` are all of it, `pending` those without a result, in the order of work."""

    config: StudyConfig
    cells: list[Cell]
    pending: list[Cell]
    workers: int
    gpus: int

    @property
    def listing(self) -> Listing:
        return self.config.experiment

    @property
    def folder(self) -> Path:
        return Path(self.config.output) / self.listing.name


def prepare(config: StudyConfig) -> Study:
    """Read the list, compose every training as `bcr.train` would, and see what is done already; ValueError for whatever does not fit."""
    for name in ("steps", "problems", "roomy", "workers", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if not config.sizes or min(config.sizes) < 1 or not config.cut_at or min(config.cut_at) < 1:
        raise ValueError(f"sizes is {config.sizes} and cut_at {config.cut_at}; each must name at least one number of 1 or more.")
    if uneven := [size for size in config.sizes if config.problems % size]:
        raise ValueError(f"problems is {config.problems}; it must be a multiple of every N, here of {uneven[0]}: all prompts are full.")
    listing = config.experiment
    check_listing(listing)
    if unknown := [name for name in config.cells or [] if name not in listing.cells]:
        raise ValueError(f"cells has {unknown[0]!r}; {listing.name} has {', '.join(listing.cells)}.")
    seeds = listing.seeds if config.seeds is None else config.seeds
    names = [name for name in listing.cells if config.cells is None or name in config.cells]
    if not seeds or not names:
        raise ValueError("seeds and cells: there must be at least one of each.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds is {list(seeds)}; each may stand there once: two processes would write into one folder.")
    base = make_cell(config, listing, BASE, 0)
    cells = [base, *(make_cell(config, listing, name, seed) for seed in seeds for name in names)]
    pending = [cell for cell in cells if not is_done(cell, config.redo)]
    gpus = torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = config.workers or gpus or max(1, cores // config.threads)
    return Study(config, cells, pending, workers, gpus)


def check_listing(listing: Listing) -> None:
    if len(listing.cells) > MOST_CELLS:
        raise ValueError(f"experiment.cells has {len(listing.cells)} cells; more than {MOST_CELLS} are several experiments.")
    for pair in listing.compare:
        if len(pair) != 2 or not set(pair) <= {BASE, *listing.cells}:
            raise ValueError(f"experiment.compare has {pair}; it takes pairs of cells, and 'base'.")


def make_cell(config: StudyConfig, listing: Listing, name: str, seed: int) -> Cell:
    overrides = [] if name == BASE else listing.cells[name].overrides
    ours = [f"output={config.output}/cells/{name}/seed-{seed}", f"seed={seed}", f"threads={config.threads}", "resume=auto"]
    ours += ["checkpoint_every=20", "keep_checkpoints=1", "sampling.invariant=false"]
    ours += ["optimizer.share_prompts=false"]  # as when docs/results.md was made, to the last bit; with true the rounding is another
    ours += [f"steps={config.steps}"] if config.steps is not None and name != BASE else []
    training = compose("train", [*overrides, *ours], TrainConfig)
    for section in (training.reward, training.advantage, training.loss, training.optimizer):
        section.check()
    sizes, cut_at = (tuple(sorted(set(numbers))) for numbers in (config.sizes, config.cut_at))
    return Cell(name, seed, training, Measurement(config.problems, sizes, config.roomy, cut_at))


def is_done(cell: Cell, redo: bool) -> bool:
    """Whether the cell has its result. One made with other settings is refused, or removed with a word where `redo` is true."""
    result = read_result(cell)
    if result is None:
        return False
    different = differences(result, cell)
    if not different:
        return True
    told = f"{cell.folder} holds a result of other settings: {'; '.join(different[:4])}"
    if not redo:
        raise ValueError(f"{told}. redo=true replaces it; another output keeps it.")
    print(f"{told}. It is done again.")
    shutil.rmtree(cell.folder)
    return False


def run(study: Study) -> None:
    """All pending cells, `workers` at a time; then the comparison. What is finished stands, whatever happens."""
    failed = []
    try:
        if study.pending and not study.config.look:
            with sigterm_interrupts():
                failed = work_through(study)
    finally:
        conclude(study)
    if failed:
        names = ", ".join(f"{cell.name} (seed {cell.seed})" for cell in failed)
        raise RunStopped(f"{len(failed)} of {len(study.pending)} ended without a result: {names}; see log.txt in their folders.")


@dataclass
class Workers:
    """The processes at work, each with its cell. They are forked from a server that has imported torch once."""

    study: Study
    active: dict[BaseProcess, tuple[Cell, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["bcr.study_cell"])
        hearing = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for the server, which tells of its children's ends: it must outlive them
        multiprocessing.forkserver.ensure_running()
        signal.signal(signal.SIGTERM, hearing)

    def start(self, cell: Cell) -> None:
        place = min(set(range(self.study.workers)) - {place for _, place in self.active.values()})
        gpu = place % self.study.gpus if self.study.gpus else None
        process = self.context.Process(target=work, args=(cell, gpu), name=f"{cell.name}/{cell.seed}")
        process.start()
        self.active[process] = (cell, place)

    def finished(self) -> list[Cell]:
        """Wait a moment; the cells whose process has ended, with a result or without."""
        multiprocessing.connection.wait([process.sentinel for process in self.active], timeout=LOOK_EVERY)
        ended = [process for process in self.active if not process.is_alive()]
        return [self.active.pop(process)[0] for process in ended]

    def stop(self) -> None:
        """Each finishes its step and writes a checkpoint.

        The signal is sent twice: one that has only just begun does not hear the first, to the others the second is an echo.
        """
        until = time.monotonic() + ECHO / 2
        for process in self.active:
            process.terminate()
        for process in self.active:
            process.join(max(0.0, until - time.monotonic()))
        for process in self.active:
            process.terminate()
        for process in self.active:
            process.join()


def work_through(study: Study) -> list[Cell]:
    """The cells that ended without a result."""
    console, workers, waiting, failed = Console(highlight=False, soft_wrap=True), Workers(study), list(study.pending), list[Cell]()
    done, begun, total = 0.0, time.perf_counter(), sum(map(cost, study.pending))
    text = TextColumn("{task.description}, about {task.fields[left]} left")
    skipped = len(study.cells) - len(study.pending)
    console.print(f"[bold]{study.listing.title}[/]: {len(study.pending)} runs to do, {skipped} done before; {study.workers} at a time.")
    already = sum(cost(cell) * progress(cell) for cell in study.pending)
    with Progress(text, BarColumn(), console=console, transient=True) as bars:
        bar = bars.add_task("", total=total, left="?")
        try:
            while waiting or workers.active:
                while waiting and len(workers.active) < study.workers:
                    workers.start(waiting.pop(0))
                for cell in workers.finished():
                    done += cost(cell)
                    result = read_result(cell)
                    failed += [] if result else [cell]
                    left = seconds_left(total, done + under_way(workers), already, begun)
                    console.print(f"{told(cell, result)}  [dim]about {spoken(left)} left[/]")
                at = done + under_way(workers)
                names = ", ".join(process.name for process in workers.active)
                bars.update(bar, completed=at, description=names, left=spoken(seconds_left(total, at, already, begun)))
        except KeyboardInterrupt:
            console.print("Stopping: the runs under way finish their step and go on from there when the study is started again.")
            workers.stop()
            raise
    return failed


def cost(cell: Cell) -> float:
    """In steps."""
    return EVALUATION_STEPS + (0 if cell.name == BASE else cell.config.steps)


def progress(cell: Cell) -> float:
    """The share of a cell's steps that its metrics show."""
    metrics = cell.folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") / cost(cell) if metrics.exists() else 0.0


def under_way(workers: Workers) -> float:
    return sum(cost(cell) * progress(cell) for cell, _ in workers.active.values())


def seconds_left(total: float, done: float, already: float, begun: float) -> float:
    """By the pace since the start; `already` was done before it."""
    return (total - done) * (time.perf_counter() - begun) / max(1.0, done - already)


def told(cell: Cell, result: dict[str, Any] | None) -> str:
    if result is None:
        return f"[red]{cell.name}, seed {cell.seed}: no result; see {cell.folder}/log.txt[/]"
    at = [
        f"N = {size}: {found['accuracy']:.1%} {found['tokens_per_problem']:.1f}" for size, found in result["sizes"].items() if size in "136"
    ]
    return f"{cell.name}, seed {cell.seed}: {', '.join(at)} tokens; {spoken(sum(result['seconds'].values()))}"


def collect(study: Study) -> dict[str, list[dict[str, Any]]]:
    """Cell -> its results in the order of the seeds; the base first. Cells without one, and results of other settings, are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in (BASE, *study.listing.cells):
        folders = (Path(study.config.output) / "cells" / name).glob("seed-*")
        seeds = sorted(int(folder.name.removeprefix("seed-")) for folder in folders if (folder / RESULT).exists())
        cells = [make_cell(study.config, study.listing, name, seed) for seed in seeds]
        read = [(cell, result) for cell in cells if (result := read_result(cell)) is not None]
        if alike := [result for cell, result in read if not differences(result, cell)]:
            found[name] = alike
    return found


def write_summary(study: Study) -> dict[str, Any] | None:
    """study.json from every result that is there; None before the first."""
    results = collect(study)
    if BASE not in results:
        return None
    about = {
        name: {"title": cell.title, "label": cell.label or name, "overrides": cell.overrides} for name, cell in study.listing.cells.items()
    }
    summary = summarise_study(study.listing.name, study.listing.title, about, study.listing.compare, results)
    study.folder.mkdir(parents=True, exist_ok=True)
    write_whole(study.folder / "study.json", json.dumps(summary, indent=1) + "\n")
    return summary


def conclude(study: Study) -> None:
    """The table and the report of what is done."""
    summary = write_summary(study)
    if summary is None:
        print("nothing is finished yet.")
        return
    Console(highlight=False, soft_wrap=True).print(overview(summary))
    for sentence in summary["said"]:
        print(f"- {sentence}")
    print(f"written: {study.folder / 'study.json'}, {write_report(study.folder)}")


if __name__ == "__main__":
    launch("study", StudyConfig, prepare, run, "study/study")
