"""`python -m bcr.solve problems.jsonl [key=value ...]`: answer a file of problems, N to a prompt. N is the throughput dial.

`n=auto` first measures the accuracy at several N on problems whose answers are known, and takes the largest N that loses no more than
`tolerance`. Answers are written as they come, one line a problem in the order of the file; a run that was cut off goes on where it
stopped, and ends with the same file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bcr.analysis.agreement import agree
from bcr.analysis.measures import summarise
from bcr.assemble import Task, build_grader, build_sampler, check_context, load_model, sampling_params
from bcr.evaluate import evaluate_cell
from bcr.records import Problem
from bcr.runtime.config import as_plain, launch
from bcr.runtime.host import choose_device, settle_in
from bcr.runtime.schema import DialectConfig, GradingConfig, ModelConfig, SamplingConfig
from bcr.sampler import Sampler
from bcr.tasks.arithmetic import ArithmeticProblems
from bcr.tasks.bundles import Budget, as_request, check_sizes, consecutive_bundles
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.problems import Columns, read_file


@dataclass
class SolveConfig:
    input: str = MISSING
    output: str | None = None
    overwrite: bool = False
    question: str = "problem"
    answer: str = "answer"
    kind: str = "text"
    n: str = "auto"
    tolerance: float = 0.02
    sizes: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 6])
    calibration: str | None = None
    calibration_problems: int = 240
    samples: int = 1
    budget: int | None = None
    budget_per_problem: int | None = 130
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    dialect: DialectConfig = field(default_factory=DialectConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)


@dataclass
class Job:
    """A checked config and what it was turned into. `n` is None where it is still to be measured."""

    config: SolveConfig
    problems: list[Problem]
    known: list[Problem]  # with gold answers, for the measurement
    n: int | None
    budget: Budget
    task: Task
    sampler: Sampler
    grader: GraderPool
    answers: Path
    summary: Path


def prepare(config: SolveConfig) -> Job:
    """Check everything and load the model; ValueError with one sentence otherwise."""
    if config.n != "auto" and not (config.n.isdigit() and int(config.n) > 0):
        raise ValueError(f"n is {config.n!r}; it must be 'auto' or a number of problems a prompt, at least 1.")
    for name, value in (("samples", config.samples), ("calibration_problems", config.calibration_problems)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if config.kind not in ("arithmetic", "text"):
        raise ValueError(f"kind is {config.kind!r}; it must be 'arithmetic' (the embedded world) or 'text'.")
    if not 0 <= config.tolerance <= 1:
        raise ValueError(f"tolerance is {config.tolerance}; it must be a loss of accuracy from 0 to 1.")
    if config.n == "auto" and 1 not in config.sizes:
        raise ValueError(f"sizes is {config.sizes}; n=auto compares with N = 1, which must be among them.")
    budget = Budget(config.budget, config.budget_per_problem)
    problems = read_questions("input", config.input, config)
    answers = Path(config.output) if config.output else Path(config.input).with_suffix(".answers.jsonl")
    if answers.resolve() == Path(config.input).resolve():
        raise ValueError(f"output is {str(answers)!r}, the input itself; name another file.")
    summary = answers.with_suffix(".summary.json")
    n = None if config.n == "auto" else int(config.n)
    if summary.exists() and not config.overwrite:
        n = settings_of(summary, config)
    elif answers.exists() and not config.overwrite:
        raise ValueError(f"output {str(answers)!r} exists and was not begun by this program; name another file, or set overwrite=true.")
    known = calibration_problems(config, problems) if n is None else []
    settle_in(config.threads)
    device = choose_device(config.device)
    if config.model.path is None:
        raise ValueError("model.path is null; name a checkpoint.")
    decoder, dialect = load_model(config.model, config.kind, config.dialect, device)
    task = Task(decoder, dialect, problems, problems + known)
    sizes = config.sizes if n is None else [n]
    check_sizes(dict.fromkeys(sizes, 1.0), budget, dialect.max_problems)
    check_context(task, sizes, budget)
    for problem in (*problems, *known):
        dialect.prompt_ids([problem])  # refuses what cannot be asked
    answers.parent.mkdir(parents=True, exist_ok=True)
    sampler, grader = build_sampler(decoder, config.sampling), build_grader(config.grading)
    for file in (answers, summary) if config.overwrite else ():
        file.unlink(missing_ok=True)
    return Job(config, problems, known, n, budget, task, sampler, grader, answers, summary)


def read_questions(key: str, path: str, config: SolveConfig) -> list[Problem]:
    """Problems of a file, answered or not; `key` names it in errors."""
    if not Path(path).is_file():
        raise ValueError(f"{key} is {path!r}: there is no such file.")
    return read_file(path, Columns(config.question, config.answer), unanswered=True)


def settings_of(summary: Path, config: SolveConfig) -> int | None:
    """The N of the run that is to go on; ValueError naming the keys that differ."""
    earlier = json.loads(summary.read_text())
    mine = as_plain(config)
    free = {"overwrite", "threads", "device", "output"}
    changed = sorted(key for key in mine if key not in free and mine[key] != earlier["config"].get(key))
    if digest(Path(config.input)) != earlier["input_sha256"]:
        changed.append("content of the input")
    if changed:
        raise ValueError(f"{summary} belongs to a run with another {', '.join(changed)}; name another output, or set overwrite=true.")
    return int(earlier["n"])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def calibration_problems(config: SolveConfig, problems: Sequence[Problem]) -> list[Problem]:
    """Problems with known answers: of the calibration file, else of the input; the embedded world can make its own."""
    pool = read_questions("calibration", config.calibration, config) if config.calibration else problems
    known = [problem for problem in pool if problem.answer]
    if not known and config.kind == "arithmetic":
        heldout = ArithmeticProblems("heldout", config.seed)
        known = [heldout[index] for index in range(config.calibration_problems)]
    if not known:
        raise ValueError(
            f"n is 'auto', but no row of {config.calibration or config.input} has {config.answer!r}; give calibration=FILE, or n=3."
        )
    return known[: config.calibration_problems]


def measure(job: Job, sizes: Sequence[int], say: Callable[[Any], None]) -> dict[int, dict[str, Any]]:
    """Accuracy, tokens and seconds a problem by N, on the same problems each time."""
    params = sampling_params(job.config.sampling, 1, job.task.dialect, job.config.seed)
    evaluate_cell(job.sampler, job.task.dialect, job.grader, job.known[:2], 1, job.budget, params)  # warm-up
    found: dict[int, dict[str, Any]] = {}
    for size in sizes:
        begun = time.perf_counter()
        judged = evaluate_cell(job.sampler, job.task.dialect, job.grader, job.known, size, job.budget, params)
        seconds = (time.perf_counter() - begun) / len(job.known)
        measures = summarise(judged)
        found[size] = {key: measures[key] for key in ("accuracy", "accuracy_se", "tokens_per_problem")} | {"seconds_per_problem": seconds}
    table = Table("N", "accuracy", "tokens/problem", "ms/problem", title=f"{len(job.known)} problems with known answers")
    for size, cell in found.items():
        accuracy = f"{cell['accuracy']:.1%} ± {cell['accuracy_se']:.1%}"
        table.add_row(str(size), accuracy, f"{cell['tokens_per_problem']:.1f}", f"{1e3 * cell['seconds_per_problem']:.1f}")
    say(table)
    return found


def largest_within(measured: dict[int, dict[str, Any]], tolerance: float) -> int:
    """The largest N whose accuracy is at most `tolerance` below that at N = 1.

    >>> largest_within({1: {"accuracy": 0.9}, 2: {"accuracy": 0.85}, 3: {"accuracy": 0.89}, 4: {"accuracy": 0.8}}, 0.02)
    3
    """
    floor = measured[1]["accuracy"] - tolerance
    return max(size for size, cell in measured.items() if cell["accuracy"] >= floor)


def solve(job: Job, n: int, done: int, progress: Callable[[float], None]) -> Iterator[list[dict[str, Any]]]:
    """Records of the problems from `done` on, some bundles at a time; `progress` is told how many are solved, also in between."""
    config, dialect = job.config, job.task.dialect
    params = sampling_params(config.sampling, config.samples, dialect, config.seed)
    bundles = consecutive_bundles(job.problems, n, dialect, job.budget, "solve")[-(-done // n) :]
    at_once = max(1, 2 * config.sampling.max_batch // config.samples)
    for start in range(0, len(bundles), at_once):
        chunk = bundles[start : start + at_once]
        asked = sum(len(bundle.problems) for bundle in chunk)

        def show(finished: int, total: int, before: int = done + start * n, asked: int = asked) -> None:
            progress(before + asked * finished / total)

        groups = job.sampler.generate([as_request(bundle) for bundle in chunk], params, show)
        records: list[dict[str, Any]] = []
        for bundle, group in zip(chunk, groups, strict=True):
            readings = [dialect.read(rollout.token_ids, rollout.finish, len(bundle.problems)) for rollout in group]
            tokens = sum(len(rollout.token_ids) for rollout in group) / len(bundle.problems)
            for place, problem in enumerate(bundle.problems):
                given = [reading.answers[place] for reading in readings]
                records.append({"id": problem.id, "answers": given, "tokens": tokens})
        for record, found in zip(records, agree([record["answers"] for record in records], job.grader), strict=True):
            record.update(answer=found.answer, agreement=found.share)
        yield [{key: record[key] for key in ("id", "answer", "agreement", "answers", "tokens")} for record in records]


def resume(answers: Path, n: int, problems: Sequence[Problem]) -> int:
    """How many problems are answered; what a cut-off run left beyond the last whole bundle is removed."""
    if not answers.exists():
        return 0
    lines = answers.read_bytes().splitlines(keepends=True)
    whole = sum(line.endswith(b"\n") for line in lines)
    done = whole if whole == len(problems) else whole // n * n
    with answers.open("r+b") as file:
        file.truncate(sum(map(len, lines[:done])))
    return done


def run(job: Job) -> None:
    console = Console(stderr=True)
    with job.grader, Progress(console=console, transient=True) as bars:
        measured = measure(job, job.config.sizes, console.print) if job.n is None else {}
        n = job.n or largest_within(measured, job.config.tolerance)
        if not job.summary.exists():
            settings = {"n": n, "measured": measured, "input_sha256": digest(Path(job.config.input)), "config": as_plain(job.config)}
            job.summary.write_text(json.dumps(settings, indent=2) + "\n")
        done, begun = resume(job.answers, n, job.problems), time.perf_counter()
        if done:
            console.print(f"{done} of {len(job.problems)} problems were answered before; going on.")
        bar = bars.add_task(f"N = {n}", total=len(job.problems), completed=done)
        with job.answers.open("a", encoding="utf-8") as file:
            for records in solve(job, n, done, lambda solved: bars.update(bar, completed=solved)):
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
        seconds = time.perf_counter() - begun
    print("\n".join(outcome(job, n, len(job.problems) - done, seconds)))


def outcome(job: Job, n: int, solved: int, seconds: float) -> list[str]:
    """What was done, and what it saved against N = 1 where that was measured."""
    records = [json.loads(line) for line in job.answers.read_text().splitlines()]
    silent = sum(record["answer"] is None for record in records)
    tokens = sum(record["tokens"] for record in records)
    each = f"{tokens / len(records):.1f} tokens a problem" + (f" in {job.config.samples} samples" if job.config.samples > 1 else "")
    said = [f"{len(records)} problems, {n} to a prompt: {each}, {silent} without an answer."]
    if job.config.samples > 1:
        said.append(f"Mean agreement of {job.config.samples} samples: {sum(record['agreement'] for record in records) / len(records):.1%}.")
    if solved:
        said.append(f"{solved} of them now, in {seconds:.1f} s ({1e3 * seconds / solved:.1f} ms a problem).")
    measured = {int(size): cell for size, cell in json.loads(job.summary.read_text())["measured"].items()}
    if n in measured and n > 1:
        one, many = measured[1], measured[n]
        less = [one[key] - many[key] for key in ("tokens_per_problem", "seconds_per_problem")]
        said.append(
            f"Saved against N = 1, by what was measured before: {less[0] * len(records) * job.config.samples:+.0f} tokens "
            f"({less[0] / one['tokens_per_problem']:+.0%}), {less[1] * len(records) * job.config.samples:+.1f} s "
            f"({less[1] / one['seconds_per_problem']:+.0%}); accuracy {many['accuracy'] - one['accuracy']:+.1%}."
        )
    return [*said, f"answers: {job.answers}"]


def main() -> None:
    """The first argument may be the file alone: `problems.jsonl` stands for `input=problems.jsonl`."""
    if len(sys.argv) > 1 and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"input={sys.argv[1]}"
    launch("solve", SolveConfig, prepare, run)


if __name__ == "__main__":
    main()
