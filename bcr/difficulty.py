"""`python -m bcr.difficulty [key=value ...]`: how often the base solves each problem, and which problems to train on.

"Train on relatively easier prompts" (The Art of Efficient Reasoning, arXiv 2602.20945): prompts that the base solves in more than half
of 8 rollouts train smoothly, the others alone make the policy collapse. A problem is asked by itself, `samples` times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from bcr.assemble import Task, assemble, build_grader, build_sampler, check_context, sampling_params
from bcr.records import Problem
from bcr.runtime.config import as_plain, launch
from bcr.runtime.host import choose_device, settle_in
from bcr.runtime.outputs import write_lines
from bcr.runtime.schema import DifficultyConfig
from bcr.sampler import Sampler, SamplingParams
from bcr.tasks.bundles import Budget, as_request, consecutive_bundles
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.judging import Judged, judge

ENDLESS = 600  # problems of the embedded world where their number is not given
CHUNK = 64  # problems between two looks at the progress bar


@dataclass
class Measurement:
    """A checked config and what it was turned into."""

    config: DifficultyConfig
    task: Task
    problems: list[Problem]
    sampler: Sampler
    grader: GraderPool
    params: SamplingParams


def prepare(config: DifficultyConfig) -> Measurement:
    """Check everything and load the model; ValueError with one sentence otherwise."""
    for name in ("problems", "samples", "budget"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if not 0 <= config.above < config.up_to <= 1:
        raise ValueError(f"above is {config.above} and up_to {config.up_to}; they must be pass rates with 0 <= above < up_to <= 1.")
    if not config.sampling.temperature > 0:
        raise ValueError(f"sampling.temperature is {config.sampling.temperature}; equal samples would measure nothing.")
    output = Path(config.output)
    if (output / "measured.jsonl").exists():
        raise ValueError(f"output {config.output!r} holds an earlier measurement; name another folder.")
    settle_in(config.threads)
    task = assemble(config.model, config.data, config.dialect, config.seed, choose_device(config.device))
    problems = task.finite[: config.problems] if task.finite else [task.problems[index] for index in range(config.problems or ENDLESS)]
    check_context(task, [1], Budget(total=config.budget), problems)
    params = sampling_params(config.sampling, config.samples, task.dialect, config.seed)
    output.mkdir(parents=True, exist_ok=True)
    return Measurement(config, task, problems, build_sampler(task.model, config.sampling), build_grader(config.grading), params)


def measure(measurement: Measurement) -> Iterator[dict[str, Any]]:
    """One record a problem, in order: the problem with its measured difficulty (1 - pass rate), pass rate, tokens and share cut off."""
    config, dialect, problems = measurement.config, measurement.task.dialect, measurement.problems
    with measurement.grader as grader:
        for start in track(range(0, len(problems), CHUNK), "problems", console=Console(stderr=True), transient=True):
            chunk = problems[start : start + CHUNK]
            bundles = consecutive_bundles(chunk, 1, dialect, Budget(total=config.budget), f"difficulty/{start}")
            groups = measurement.sampler.generate([as_request(bundle) for bundle in bundles], measurement.params)
            for problem, group in zip(chunk, judge(bundles, groups, dialect, grader), strict=True):
                yield record_of(problem, group)


def record_of(problem: Problem, group: Sequence[Judged]) -> dict[str, Any]:
    """What is written of a problem: a row that `data.path` can read again, with the measured difficulty in place of the source's."""
    pass_rate = sum(judged.accuracy for judged in group) / len(group)
    return {
        "id": problem.id,
        "problem": problem.question,
        "answer": problem.answer,
        "source": problem.source,
        "difficulty": 1 - pass_rate,
        "source_difficulty": problem.difficulty,
        "pass_rate": pass_rate,
        "samples": len(group),
        "mean_tokens": sum(len(judged.rollout.token_ids) for judged in group) / len(group),
        "truncated": sum(judged.rollout.finish == "length" for judged in group) / len(group),
    }


def run(measurement: Measurement) -> None:
    """Writes measured.jsonl (all problems), easier.jsonl (those to train on), excluded.jsonl and summary.json."""
    config, output, excluded = measurement.config, Path(measurement.config.output), measurement.task.excluded
    records = []
    with (output / "measured.jsonl").open("w", encoding="utf-8") as file:
        for record in measure(measurement):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            records.append(record)
    easier = [record for record in records if config.above < record["pass_rate"] <= config.up_to]
    write_lines(output / "easier.jsonl", easier)
    write_lines(output / "excluded.jsonl", map(vars, excluded))
    steps = sorted({record["pass_rate"] for record in records})
    summary = {
        "problems": len(records),
        "easier": len(easier),
        "excluded": len(excluded),
        "mean_pass_rate": sum(record["pass_rate"] for record in records) / len(records),
        "problems_by_pass_rate": {f"{rate:.3f}": sum(record["pass_rate"] == rate for record in records) for rate in steps},
    }
    (output / "summary.json").write_text(json.dumps({**summary, "config": as_plain(config)}, indent=2) + "\n")
    print(f"{len(easier):,} of {len(records):,} problems have a pass rate above {config.above:g}: {output / 'easier.jsonl'}")


if __name__ == "__main__":
    launch("difficulty", DifficultyConfig, prepare, run)
