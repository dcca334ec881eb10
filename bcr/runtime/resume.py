"""`resume=auto`: find where an output folder's run can go on, or say in one sentence why it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bcr.model import Decoder
from bcr.parallel.ranks import Ranks
from bcr.runtime.checkpoint import damage
from bcr.runtime.checkpoints import point_latest_to, step_folders, tidy
from bcr.runtime.config import as_plain
from bcr.runtime.outputs import holds_run
from bcr.runtime.schema import TrainConfig
from bcr.runtime.training_state import Stateful, Trained, read_plain, restore, versions

# What may differ between a run and its resumption: nothing that a step's result depends on.
FREE = (
    *("output", "overwrite", "resume", "steps", "checkpoint_every", "keep_checkpoints", "logging.tensorboard", "logging.wandb"),
    *("parallel.samplers", "parallel.shard_size", "parallel.timeout_s"),  # as the number of ranks: of influence on the rounding alone
)


EARLIER = {"optimizer.share_prompts": False}  # what a config means that is older than the setting, where that is not today's default


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that was found whole, and the plain part of its state. `checkpoint` None: the run was cut off before its first."""

    checkpoint: Path | None
    plain: dict[str, Any]

    def threads(self, ranks: Ranks) -> int | None:
        """The thread count that the run had: part of what makes it the same to the last bit, which with other ranks it is not."""
        return self.plain.get("threads") if self.plain.get("ranks") == ranks.size else None

    def check(self, model: Decoder) -> None:
        """ValueError for weights of another precision than the run's: what `model.dtype=auto` means depends on the machine."""
        before, here = self.plain.get("dtype"), str(model.head_weight.dtype)
        if before not in (None, here):
            raise ValueError(f"{self.checkpoint}: its weights were {before} and are {here} here; resume with the dtype it began with.")

    def restore(
        self, learner: Trained | None, parts: Mapping[str, Stateful], ranks: Ranks, learners: Ranks | None = None
    ) -> tuple[int, dict[str, int]]:
        """Put everything back; the steps done, and where to cut the run's files. `learners`: where not all ranks have a learner."""
        if self.checkpoint is None:
            return 0, {}
        restore(self.checkpoint, learner, parts, ranks, learners)
        return int(self.plain["step"]), dict(self.plain["offsets"])


def find_resumption(config: TrainConfig, ranks: int = 1) -> Resumption | None:
    """Where the run in `config.output` can go on: at its newest checkpoint that is whole. None where the folder holds no run.

    Says on stdout what was passed over and why. ValueError for a run with another config (naming the fields), and for one whose
    checkpoints are all damaged.
    """
    if config.resume not in ("never", "auto"):
        raise ValueError(f"resume is {config.resume!r}; it must be 'never' or 'auto'.")
    if config.resume == "auto" and config.overwrite:
        raise ValueError("resume=auto goes on with the run in the output folder and overwrite=true removes it; set one of them.")
    folder = Path(config.output)
    if config.resume == "never" or not holds_run(folder):
        return None
    refuse_other_config(config, folder)
    tidy(folder / "checkpoints")
    faults: list[str] = []
    for checkpoint in reversed(step_folders(folder / "checkpoints")):
        fault = damage(checkpoint)
        if fault is None:
            try:
                plain = read_plain(checkpoint)
                fault = too_short(folder, plain["offsets"])
            except ValueError as error:
                fault = str(error)
        if fault is None:
            say(checkpoint, plain, faults, ranks, config.parallel.samplers)
            point_latest_to(checkpoint)
            return Resumption(checkpoint, plain)
        faults.append(f"{checkpoint.name} cannot be used: {fault}")
    if faults:
        raise ValueError(f"output {str(folder)!r} has no checkpoint to resume from ({'; '.join(faults)}); overwrite=true starts afresh.")
    print(f"{folder}: the run was cut off before its first checkpoint; it starts again at step 1.")
    return Resumption(None, {})


def say(checkpoint: Path, plain: Mapping[str, Any], faults: list[str], ranks: int, samplers: int = 0) -> None:
    for fault in faults:
        print(f"{checkpoint.parent}: {fault}")
    print(f"resuming from {checkpoint}, after step {plain['step']}")
    samplers_then = plain.get("samplers", 0)
    if (plain["ranks"], samplers_then) != (ranks, samplers):
        roles = [f", {count} of them samplers" if count else "" for count in (samplers_then, samplers)]
        change = f"written by {plain['ranks']} ranks{roles[0]}, read by {ranks}{roles[1]}"
        print(f"{checkpoint}: {change}; the run will be the same up to rounding.")
    if plain["versions"] != (here := versions()):
        print(f"{checkpoint}: written with {plain['versions']}, read with {here}; the run will not be the same to the last bit.")


def too_short(folder: Path, offsets: Mapping[str, int]) -> str | None:
    for name, offset in offsets.items():
        file = folder / f"{name}.jsonl"
        size = file.stat().st_size if file.exists() else 0
        if size < offset:
            return f"{file.name} has {size} bytes and had {offset} when it was written"
    return None


def refuse_other_config(config: TrainConfig, folder: Path) -> None:
    """ValueError naming the fields in which `config` differs from the one that the folder's run was started with."""
    file = folder / "config.yaml"
    if not file.exists():  # cut off before it was written, or removed; then nothing else of worth is here either
        raise ValueError(f"output {str(folder)!r} has no config.yaml to compare with; overwrite=true starts afresh.")
    before, now = EARLIER | flat(OmegaConf.to_container(OmegaConf.load(file))), flat(as_plain(config))  # type: ignore[arg-type]
    names = [name for name in {**before, **now} if name not in FREE]
    different = [f"{name} was {before.get(name)} and is {now.get(name)}" for name in names if before.get(name) != now.get(name)]
    if different:
        raise ValueError(f"output {str(folder)!r} holds a run with another config: {'; '.join(different)}. Resume with the same one.")


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested containers to dotted names.

    >>> flat({"seed": 0, "model": {"path": "x", "random": None}, "sizes": [1, 3]})
    {'seed': 0, 'model.path': 'x', 'model.random': None, 'sizes': [1, 3]}
    """

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            yield prefix, value

    return dict(walk("", config))
