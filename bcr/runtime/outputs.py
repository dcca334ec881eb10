"""What a run writes: metrics, timings and rollouts as JSON lines, and the same metrics to TensorBoard or W&B when asked."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from bcr.runtime.config import as_plain
from bcr.runtime.schema import TrainConfig

STREAMS = ("metrics", "timings", "rollouts", "events")
WANDB_ID = "wandb-id.txt"
RUN = ("config.yaml", *(f"{stream}.jsonl" for stream in STREAMS), "checkpoints", "tensorboard", WANDB_ID)  # what a run leaves in its folder


class RunFiles:
    """The files of one output folder. `metrics.jsonl` is the same for the same seed; everything that a clock says goes to `timings.jsonl`.

    A context manager. Every record is on its way to the disk when `write` returns; a full disk raises OSError there. A resumed run
    gives the `offsets` (bytes, by stream) of its checkpoint, and what was written after them is cut off. Of several ranks the `first`
    writes; on the others nothing happens.
    """

    def __init__(self, config: TrainConfig, offsets: Mapping[str, int] | None = None, steps_done: int = 0, first: bool = True) -> None:
        self.folder = Path(config.output)
        self.streams: dict[str, TextIO] = {}
        self.trackers: list[TensorBoard | WandB] = []
        if not first:
            return
        write_whole(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(as_plain(config))))
        self.streams = {name: (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") for name in STREAMS}
        for name, stream in self.streams.items():
            stream.truncate((offsets or {}).get(name, 0))
        self.trackers = trackers(config, steps_done)

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.streams.values():
            stream.close()
        for tracker in self.trackers:
            tracker.close()

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        stream = self.streams.get(name)
        if stream is None:
            return
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        if name in ("metrics", "timings"):
            for tracker in self.trackers:
                tracker.log(record["step"], {key: value for key, value in record.items() if key != "step" and value is not None})

    def offsets(self) -> dict[str, int]:
        """Bytes of each stream so far, all of them on the disk: where a checkpoint taken now will cut the files."""
        for stream in self.streams.values():
            os.fsync(stream.fileno())
        return {name: stream.tell() for name, stream in self.streams.items()}


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in RUN)


def make_room(folder: Path, overwrite: bool) -> None:
    """Make the output folder; ValueError if it holds an earlier run, which `overwrite` removes."""
    folder.mkdir(parents=True, exist_ok=True)
    if holds_run(folder) and not overwrite:
        raise ValueError(
            f"output {str(folder)!r} holds an earlier run; name another folder, set resume=auto to go on with it, "
            "or overwrite=true to replace it."
        )
    for path in [folder / name for name in RUN if (folder / name).exists()]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whenever the process is killed."""
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, file)


def write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """A whole file of JSON lines at once."""
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


class TensorBoard:
    def __init__(self, folder: Path, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1 if steps_done else None)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One run there for one output folder: a resumed run goes on with it. (What is logged again for steps that it has, it ignores.)"""

    def __init__(self, project: str, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        file = folder / WANDB_ID
        if not file.exists():
            write_whole(file, secrets.token_hex(8))
        self.run = wandb.init(project=project, id=file.read_text(), resume="allow", dir=str(folder), config=config)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def check_trackers(config: TrainConfig) -> None:
    """Raise ValueError for a tracker that is asked for and not installed."""
    for asked, package in ((config.logging.tensorboard, "tensorboard"), (config.logging.wandb, "wandb")):
        if asked and importlib.util.find_spec(package) is None:
            raise ValueError(f"logging.{package} is set, but {package} is not installed; pip install 'bcr[tracking]'.")


def trackers(config: TrainConfig, steps_done: int) -> list[TensorBoard | WandB]:
    chosen: list[TensorBoard | WandB] = []
    if config.logging.tensorboard:
        chosen.append(TensorBoard(Path(config.output), steps_done))
    if config.logging.wandb:
        chosen.append(WandB(config.logging.wandb, Path(config.output), as_plain(config)))
    return chosen
