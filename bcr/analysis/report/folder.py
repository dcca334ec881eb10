"""What a folder of results holds, read as it is: a training run, or a demo (summary.json and the training runs below it)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

Record = dict[str, Any]

LABELS = {"base": "base", "bcr": "BCR", "grpo": "GRPO", "bcr_tight": "BCR, tight", "same_cap": "same cap", "penalty": "penalty"}


@dataclass(frozen=True)
class Training:
    """The files of one training run; every list may be empty while the run is young."""

    config: Record
    metrics: list[Record]
    rollouts: list[Record]


@dataclass(frozen=True)
class Run:
    """One policy. `label` fits beside a curve, `title` is for people; `measures` by N, from the evaluation on held-out problems."""

    key: str
    title: str
    label: str
    measures: dict[int, Record] = field(default_factory=dict)
    training: Training | None = None


@dataclass(frozen=True)
class Results:
    """`summary` is empty for a training run alone. Base first, then the runs in the order of the summary."""

    name: str
    summary: Record
    runs: list[Run]
    evaluations: list[Record]

    @property
    def main(self) -> Run:
        """The run that the report is about: the first one that was trained, or the only one."""
        return next((run for run in self.runs if run.key != "base"), self.runs[0])

    @property
    def base(self) -> Run | None:
        return next((run for run in self.runs if run.key == "base"), None)


def read_results(folder: Path) -> Results:
    """Raises ValueError where the folder holds neither a demo's summary.json nor a training run's metrics.jsonl."""
    name = folder.resolve().name
    if (folder / "summary.json").exists():
        summary = parsed((folder / "summary.json").read_text(encoding="utf-8"), "summary.json")
        described = summary.get("runs") or {key: {} for key in LABELS if key in summary}
        runs = [demo_run(folder, key, about, summary.get(key) or {}) for key, about in described.items()]
        runs.sort(key=lambda run: run.key != "base")
        if not runs:
            raise ValueError(f"{folder / 'summary.json'} names no runs; it must be the summary.json of a demo.")
        return Results(name, summary, runs, read_lines(folder / "evaluations.jsonl"))
    if (folder / "metrics.jsonl").exists():
        training = read_training(folder)
        return Results(name, {}, [Run("run", run_title(training.config) or name, name, {}, training)], [])
    raise ValueError(f"{folder} holds neither summary.json (a demo) nor metrics.jsonl (a training run); name the folder of one of them.")


def demo_run(folder: Path, key: str, about: Record, measures: Record) -> Run:
    below = folder / about["folder"] if about.get("folder") else None
    training = read_training(below) if below is not None and (below / "metrics.jsonl").exists() else None
    label = LABELS.get(key, key.replace("_", " "))
    return Run(key, about.get("title") or label, label, {int(size): cell for size, cell in measures.items()}, training)


def read_training(folder: Path) -> Training:
    config = OmegaConf.load(folder / "config.yaml") if (folder / "config.yaml").exists() else OmegaConf.create()
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return Training(plain, read_lines(folder / "metrics.jsonl"), read_lines(folder / "rollouts.jsonl"))  # type: ignore[arg-type]


def read_lines(file: Path) -> list[Record]:
    """The records of a JSON-lines file; none where it is missing. A last line cut short, by an interrupt say, is left out."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    whole = text.split("\n")[:-1]  # what follows the last newline is not finished
    return [parsed(line, f"{file.name}, line {number}") for number, line in enumerate(whole, 1) if line.strip()]


def parsed(text: str, where: str) -> Record:
    """ValueError that says where, for what is not a JSON object."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}).") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds {text[:40]!r}; it must be a JSON object.")
    return record


def run_title(config: Record) -> str:
    """One line that says what was trained how; empty where the config does not say."""
    bundles = config.get("bundles")
    if not bundles:
        return ""
    sizes = bundles["sizes"]
    what = "BCR" if max(sizes) > 1 else "GRPO"
    budget = f"{bundles['budget']} tokens shared" if bundles.get("budget") else f"{bundles.get('budget_per_problem')} tokens a problem"
    return f"{what}, N = {', '.join(map(str, sizes))}, {budget}"
