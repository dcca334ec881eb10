"""What a run writes: metrics, timings and rollouts as JSON lines, and the same metrics to TensorBoard or W&B when asked."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bcr.runtime.config import as_plain
from bcr.runtime.schema import TrainConfig

STREAMS = ("metrics", "timings", "rollouts")


class RunFiles:
    """The files of one output folder. `metrics.jsonl` is the same for the same seed; everything that a clock says goes to `timings.jsonl`.

    A context manager. Every record is on its way to the disk when `write` returns; a full disk raises OSError there.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.folder = Path(config.output)
        self.config = config
        (self.folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(as_plain(config))))
        self.streams = {name: (self.folder / f"{name}.jsonl").open("w", encoding="utf-8") for name in STREAMS}
        self.trackers = trackers(config)

    def __enter__(self) -> RunFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.streams.values():
            stream.close()
        for tracker in self.trackers:
            tracker.close()

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        stream = self.streams[name]
        stream.write(json.dumps(record) + "\n")
        stream.flush()
        if name != "rollouts":
            for tracker in self.trackers:
                tracker.log(record["step"], {key: value for key, value in record.items() if key != "step" and value is not None})


def make_room(folder: Path, overwrite: bool) -> None:
    """Make the output folder; ValueError if it holds an earlier run, which `overwrite` removes."""
    folder.mkdir(parents=True, exist_ok=True)
    earlier = [folder / name for name in (*(f"{stream}.jsonl" for stream in STREAMS), "config.yaml", "checkpoints", "tensorboard")]
    found = [path for path in earlier if path.exists()]
    if found and not overwrite:
        raise ValueError(f"output {str(folder)!r} holds an earlier run; name another folder, or set overwrite=true to replace it.")
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """A whole file of JSON lines at once."""
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, project: str, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(project=project, dir=str(folder), config=config)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def check_trackers(config: TrainConfig) -> None:
    """Raise ValueError for a tracker that is asked for and not installed."""
    for asked, package in ((config.logging.tensorboard, "tensorboard"), (config.logging.wandb, "wandb")):
        if asked and importlib.util.find_spec(package) is None:
            raise ValueError(f"logging.{package} is set, but {package} is not installed; pip install 'bcr[tracking]'.")


def trackers(config: TrainConfig) -> list[TensorBoard | WandB]:
    chosen: list[TensorBoard | WandB] = []
    if config.logging.tensorboard:
        chosen.append(TensorBoard(Path(config.output)))
    if config.logging.wandb:
        chosen.append(WandB(config.logging.wandb, Path(config.output), as_plain(config)))
    return chosen
