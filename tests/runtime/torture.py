"""Kill a training run again and again, resume it each time, and compare it with a run that nobody touched.

`python -m tests.runtime.torture [kills] [seed]`. The runs are forked from a server that has everything imported, so that a start costs a
tenth of a second. Each reports the phases it enters; the killer waits for one, lets a random moment pass, and sends SIGKILL.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bcr import rollouts, train
from bcr.learner import learner
from bcr.runtime import checkpoints, training_state
from bcr.runtime.config import compose
from bcr.runtime.schema import TrainConfig

STEPS = 10
SETTINGS = [
    "device=cpu",
    "threads=1",
    f"steps={STEPS}",
    "resume=auto",
    "checkpoint_every=1",
    "keep_checkpoints=3",
    "bundles.per_step=2",
    "bundles.group=4",
    "bundles.sizes=[1,2]",
    "bundles.budget=null",
    "bundles.budget_per_problem=25",
    "sampling.row_block=8",
]
PHASES = {  # what is called when a phase begins, as seen by the code that calls it
    "sampling": (rollouts.Sampler, "generate"),
    "grading": (train, "judge"),
    "learning": (learner, "optimizer_step"),
    "writing": (training_state, "save_checkpoint"),
    "latest": (checkpoints, "point_latest_to"),
}


def run(place: Path, phases: Connection | None) -> None:
    """The training program's body with its output in `place`/run, telling every phase that it enters."""
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)  # so that the config, which names the output, is the same for every run
    if phases is not None:
        for name, (owner, attribute) in PHASES.items():
            setattr(owner, attribute, announced(name, getattr(owner, attribute), phases))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    train.main(train.prepare(compose("train", ["output=run", *SETTINGS], TrainConfig)))


def announced(name: str, function: Callable[..., Any], phases: Connection) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        phases.send(name)
        return function(*args, **kwargs)

    return wrapper


def torture(folder: Path, kills: int, seed: int = 0) -> list[str]:
    """The phases in which runs were killed, `kills` in all. AssertionError where a run's outcome is not that of the undisturbed one.

    A run that ends before it has been killed often enough is compared, and the next one begins.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bcr.train"])
    begun = time.perf_counter()
    undisturbed = context.Process(target=run, args=(folder / "undisturbed", None))
    undisturbed.start()
    undisturbed.join()
    assert undisturbed.exitcode == 0
    expected, pace = outcome(folder / "undisturbed" / "run"), (time.perf_counter() - begun) / STEPS
    chance, killed = random.Random(seed), list[str]()
    rounds = itertools.count()
    while len(killed) < kills:
        place = folder / f"tortured-{next(rounds)}"
        exitcode = -signal.SIGKILL
        while exitcode == -signal.SIGKILL:
            phases, far = context.Pipe(duplex=False)
            process = context.Process(target=run, args=(place, far))
            process.start()
            far.close()
            if len(killed) < kills:
                phase = list(PHASES)[len(killed) % len(PHASES)]
                killed += kill_in(process, phases, phase, chance.randint(1, 3), chance.random() * pace / 2)
            process.join()
            phases.close()
            exitcode = process.exitcode
        assert exitcode == 0, exitcode
        found = outcome(place / "run")
        assert found == expected, {name: (expected.get(name), found.get(name)) for name in {**expected, **found}}
    return killed


def kill_in(process: BaseProcess, phases: Connection, phase: str, times: int, delay_s: float) -> list[str]:
    """Kill the run so long after it has entered `phase` so many times: [phase]; [] if it comes to its end before."""
    try:
        while times:
            times -= phases.recv() == phase
    except EOFError:
        return []
    time.sleep(delay_s)
    process.kill()
    process.join()
    return [phase] if process.exitcode == -signal.SIGKILL else []


def outcome(folder: Path) -> dict[str, str]:
    """Every file with its checksum, except for what a clock says: of timings the number of lines, of the states' index the presence."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if name == "timings.jsonl":
            found[name] = str(len(file.read_text().splitlines()))
        elif file.name in (".metadata", "state.json", "checksums.sha256"):
            found[name] = "there"
        else:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


if __name__ == "__main__":
    kills, seed = map(int, (sys.argv[1:] + ["20", "0"][len(sys.argv) - 1 :])[:2])
    with tempfile.TemporaryDirectory() as name:
        killed = torture(Path(name), kills, seed)
    counts = ", ".join(f"{phase} ({killed.count(phase)})" for phase in PHASES)
    print(f"killed {len(killed)} times, while {counts}: every run ended with the weights and files of an undisturbed one")
