"""One cell of a study with one seed: train by its recipe, measure it on the held-out problems, and leave one result file.

A result appears whole or not at all. What is kept: `result.json`, the config and the metrics of training; checkpoints and rollouts go once
the result is there. A cell that was cut off goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bcr.analysis.breakdowns import under_budgets
from bcr.analysis.cell import describe
from bcr.evaluate import evaluate_cell
from bcr.records import Problem, Verdict
from bcr.runtime.config import as_plain
from bcr.runtime.outputs import RUN, write_whole
from bcr.runtime.resume import EARLIER, flat
from bcr.runtime.schema import TrainConfig
from bcr.runtime.stop import StopRequest
from bcr.sampler import SamplingParams
from bcr.tasks.arithmetic import ArithmeticProblems
from bcr.tasks.bundles import Budget
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.judging import Judged
from bcr.train import Run, prepare, train

BASE = "base"
RESULT = "result.json"
LETTERS = dict(zip(Verdict, "cwupte", strict=True))  # correct, wrong, unanswered, unparsed, timeout, error
NOT_COMPARED = (  # settings that a result does not depend on, or not more than on the machine
    *("output", "overwrite", "resume", "threads", "device", "checkpoint_every", "keep_checkpoints", "logging"),
    *("sampling.invariant", "sampling.cache_mb"),
)


@dataclass(frozen=True)
class Measurement:
    """How every cell is measured: the first `problems` held-out ones at each N of `sizes` with `roomy` tokens for each, and the same
    completions cut to every budget of `cut_at`."""

    problems: int
    sizes: tuple[int, ...]
    roomy: int
    cut_at: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """`config.output` is the folder of its results. The base is a cell that is not trained."""

    name: str
    seed: int
    config: TrainConfig
    measurement: Measurement

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


def work(cell: Cell, gpu: int | None = None) -> None:
    """What a worker process does: everything it prints goes to log.txt. Leaves no result where it was asked to stop."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / "log.txt").open("a", buffering=1, encoding="utf-8") as log, StopRequest(handed_on=True) as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the study passes it on, once, as SIGTERM
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        begun = time.perf_counter()
        forget_other_run(cell)
        run = prepare(cell.config)
        if cell.name != BASE:
            train(run, Quiet(), stop)
        trained = time.perf_counter()
        if stop():
            return
        found = {str(size): measure(run, cell, size) for size in cell.measurement.sizes}
        seconds = {"training": round(trained - begun, 1), "evaluation": round(time.perf_counter() - trained, 1)}
        result = {
            "cell": cell.name,
            "seed": cell.seed,
            "config": compared(cell.config),
            "measurement": asdict(cell.measurement),
            "seconds": seconds,
            "training": None if cell.name == BASE else training_totals(cell.folder),
            "difficulties": [problem.difficulty for problem in heldout(cell.measurement.problems)],
            "sizes": found,
        }
        write_whole(cell.folder / RESULT, json.dumps(result, separators=(",", ":")) + "\n")
        for name in ("checkpoints", "rollouts.jsonl"):
            path = cell.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def forget_other_run(cell: Cell) -> None:
    """Remove what an unfinished run of other settings has left; `resume=auto` would refuse to go on with it."""
    file = cell.folder / "config.yaml"
    if file.exists():
        before = completed(flat(OmegaConf.to_container(OmegaConf.load(file))))  # type: ignore[arg-type]
        if before == compared(cell.config) and flat(as_plain(cell.config))["threads"] == OmegaConf.load(file).threads:
            return
        print(f"{cell.folder}: an unfinished run of other settings is removed.")
    for name in RUN:
        path = cell.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class Quiet:
    """A console that only passes on warnings; progress is read from the files."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def step(self, number: int, values: Any) -> None:
        return None

    def warn(self, message: str) -> None:
        print(f"warning: {message}")


def heldout(count: int) -> list[Problem]:
    problems = ArithmeticProblems("heldout")
    return [problems[index] for index in range(count)]


def measure(run: Run, cell: Cell, size: int) -> dict[str, Any]:
    """All that is kept of one N: `describe`, and for every problem its verdict, its tokens, and its verdict under each tighter budget."""
    dialect, asked = run.task.dialect, cell.measurement
    params = SamplingParams(1.0, 1, dialect.stop_token_ids, cell.seed)
    with GraderPool(1) as grader:
        judged = evaluate_cell(run.sampler, dialect, grader, heldout(asked.problems), size, Budget(per_problem=asked.roomy), params)
        cut = under_budgets(judged, asked.cut_at, dialect, grader)
    return {
        **describe(judged, dialect),
        "outcomes": letters(judged),
        "tokens": [tokens for one in judged for tokens in one.tokens_by_problem],
        "cut": {str(budget): letters(found) for budget, found in cut.items()},
    }


def letters(judged: Sequence[Judged]) -> str:
    """One letter a problem, in the order of the problems."""
    return "".join(LETTERS[verdict] for one in judged for verdict in one.verdicts)


def training_totals(folder: Path) -> dict[str, float]:
    """Steps, problems learnt from (each rollout counts) and all tokens sampled in training, from its metrics."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens = math.fsum(step.get("tokens_sampled", step["tokens_per_problem"] * step["problems"]) for step in steps)
    return {"steps": len(steps), "problems": sum(step["problems"] for step in steps), "tokens": round(tokens)}


def compared(config: TrainConfig) -> dict[str, Any]:
    """The part of a config that a result depends on, with dotted names."""
    return kept(flat(as_plain(config)))


def kept(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.startswith(NOT_COMPARED)}


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a config that may be older than some setting, which then counts as what it was."""
    return {**compared(TrainConfig()), **kept(EARLIER | settings)}


def differences(result: dict[str, Any], cell: Cell) -> list[str]:
    """In which settings a result was made otherwise than the cell asks."""
    now, before = compared(cell.config), completed(result["config"])
    found = [f"{name} was {before.get(name)} and is {now.get(name)}" for name in {**before, **now} if before.get(name) != now.get(name)]
    asked, had = json.loads(json.dumps(asdict(cell.measurement))), result["measurement"]
    return found + [f"{name} was {had.get(name)} and is {asked[name]}" for name in asked if had.get(name) != asked[name]]


def read_result(cell: Cell) -> dict[str, Any] | None:
    """The finished result of a cell, whatever config it was made with; None where there is none."""
    file = cell.folder / RESULT
    return json.loads(file.read_text()) if file.exists() else None
