"""Kill ranks of a training run under torchrun again and again, resume it each time, and compare it with a run that nobody touched.

`python -m tests.parallel.torture [kills] [ranks] [seed]`. Each rank reports the phases it enters; the killer waits for one, lets a random
moment pass, and sends SIGKILL to one rank or to all. Then it waits until torchrun and all ranks have left.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.runtime.torture import PHASES, SETTINGS, STEPS, outcome

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds for whatever must come by itself


@dataclass(frozen=True)
class Kill:
    phase: str
    ranks: tuple[int, ...]
    seconds: float  # until torchrun had ended, and every rank with it


@dataclass(frozen=True)
class Entry:
    """A rank enters a phase."""

    time: float
    rank: int
    process: int
    phase: str


class Run:
    """torchrun with its ranks; the output goes to `place`/run, what is said to `place`/said.txt."""

    def __init__(self, place: Path, ranks: int) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.place, self.ranks, self.log = place, ranks, place / "phases"
        self.log.write_text("")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["-m", "tests.parallel.tortured", "output=run", *SETTINGS]
        places = {"PHASES": str(self.log), "TMPDIR": str(place), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        with (place / "said.txt").open("a") as said:  # in `place`, so that the config, which names the output, is the same for every run
            self.process = subprocess.Popen(command, cwd=place, env=os.environ | places, stdout=said, stderr=said)

    def entries(self) -> list[Entry]:
        lines = (line.split() for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n"))
        return [Entry(float(time), int(rank), int(process), phase) for time, rank, process, phase in lines]

    def wait(self) -> int:
        """torchrun's exit code."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()

    def kill(self, phase: str, times: int, delay_s: float, victims: Sequence[int]) -> list[Kill]:
        """SIGKILL to the victims so long after a rank has entered the phase for that many times; [] if the run comes to its end before."""
        begun = time.monotonic()
        while sum(entry.phase == phase for entry in self.entries()) < times or len({entry.rank for entry in self.entries()}) < self.ranks:
            if self.process.poll() is not None:
                return []
            assert time.monotonic() - begun < PATIENCE, self.entries()
            time.sleep(0.005)
        time.sleep(delay_s)
        processes = {entry.rank: entry.process for entry in self.entries()}
        if self.process.poll() is not None:
            return []
        for rank in victims:
            os.kill(processes[rank], signal.SIGKILL)
        killed = time.monotonic()
        code = self.wait()
        return [Kill(phase, tuple(victims), time.monotonic() - killed)] if code else []


def torture(folder: Path, kills: int, ranks: int = 2, seed: int = 0) -> list[Kill]:
    """`kills` kills. AssertionError where a run's outcome is not that of the undisturbed one.

    A run that ends before it has been killed often enough is compared, and the next one begins.
    """
    undisturbed = Run(folder / "undisturbed", ranks)
    assert undisturbed.wait() == 0, (folder / "undisturbed" / "said.txt").read_text()
    entries = [entry.time for entry in undisturbed.entries() if entry.phase in PHASES]
    expected, pace = outcome(folder / "undisturbed" / "run"), (entries[-1] - entries[0]) / STEPS
    chance, killed = random.Random(seed), list[Kill]()
    whom = [*((rank,) for rank in range(ranks)), tuple(range(ranks))]
    for number in itertools.count():
        if len(killed) == kills:
            return killed
        place, ended = folder / f"tortured-{number}", False
        while not ended:
            run = Run(place, ranks)
            before = len(killed)
            if before < kills:
                phase = list(PHASES)[before % len(PHASES)]
                killed += run.kill(phase, chance.randint(1, 3 * ranks), chance.random() * pace / 2, chance.choice(whom))
            ended = len(killed) == before
        assert run.wait() == 0, (place / "said.txt").read_text()
        found = outcome(place / "run")
        assert found == expected, {name: (expected.get(name), found.get(name)) for name in {**expected, **found}}
    raise AssertionError


if __name__ == "__main__":
    kills, ranks, seed = map(int, (sys.argv[1:] + ["20", "2", "0"][len(sys.argv) - 1 :])[:3])
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        killed = torture(Path(name), kills, ranks, seed)
    counts = ", ".join(f"{phase} ({sum(kill.phase == phase for kill in killed)})" for phase in PHASES)
    hit = ", ".join(f"{whom} ({sum(kill.ranks == whom for kill in killed)})" for whom in sorted({kill.ranks for kill in killed}))
    print(f"killed {len(killed)} times, while {counts}; ranks {hit}: every run ended with the weights and files of an undisturbed one")
    print(f"after a kill all had left within {max(kill.seconds for kill in killed):.1f} s; {time.monotonic() - begun:.0f} s in all")
