"""`make demo`: the whole argument on a laptop. The shipped base, BCR, and what one would try instead, each trained and measured alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bcr.analysis.conclusions import conclusions, results_table
from bcr.analysis.measures import hardest_problems, summarise
from bcr.analysis.plots import before_and_after
from bcr.analysis.transcripts import transcript
from bcr.evaluate import evaluate_cell
from bcr.records import Problem
from bcr.report import write_report
from bcr.runtime.config import compose, launch
from bcr.runtime.demo_console import DemoConsole
from bcr.runtime.progress import spoken
from bcr.runtime.schema import TrainConfig
from bcr.sampler import SamplingParams
from bcr.tasks.arithmetic import ArithmeticProblems
from bcr.tasks.bundles import Budget
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.judging import Judged
from bcr.train import Run, train
from bcr.train import prepare as prepare_training

KEPT_SIZES, KEPT_BUNDLES = (1, 3), 12  # of every evaluation in evaluations.jsonl, to be read side by side


@dataclass(frozen=True)
class Part:
    """One training run: `python -m bcr.train experiment=...` and nothing else. Costs are seconds on two quiet cores, for the time left."""

    experiment: str
    title: str
    sentence: str
    step_cost: float
    evaluation_cost: float  # of all cells of 600 problems
    every: int = 10  # steps between two lines on the console


BASE_COST = 16.2  # of the base's evaluation

PARTS = {
    "bcr": Part(
        "arithmetic_mixed_n",
        "BCR, N = 1 to 6",
        "One to six problems in a prompt share 160 tokens; the reward is the accuracy of each answer and nothing else.",
        step_cost=1.0,
        evaluation_cost=7.2,
    ),
    "grpo": Part(
        "arithmetic_single",
        "GRPO, N = 1",
        "Plain GRPO: the same reward, one problem in a prompt, a cap that never binds. Watch the tokens grow.",
        step_cost=1.36,
        evaluation_cost=10.6,
    ),
    "bcr_tight": Part(
        "arithmetic_tight_budget",
        "BCR, 66 for 3",
        "Three problems share 66 tokens: an easy one can lend to a hard one.",
        step_cost=0.64,
        evaluation_cost=2.9,
    ),
    "same_cap": Part(
        "arithmetic_same_cap",
        "22 for each",
        "The control: as many tokens for each problem, but nothing to lend.",
        step_cost=0.39,
        evaluation_cost=4.2,
    ),
    "penalty": Part(
        "arithmetic_length_penalty",
        "Length penalty",
        "The obvious rival: correct - 2 * tokens / 40 on single problems. Watch the accuracy.",
        step_cost=0.39,
        evaluation_cost=1.9,
        every=2,
    ),
}


@dataclass
class DemoConfig:
    output: str = "outputs/demo"
    seed: int = 0
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    steps: int | None = None
    problems: int = 600
    sizes: list[int] = field(default_factory=lambda: [1, 2, 3, 6])
    roomy: int = 130
    shared: int = 110
    threads: int | None = None


@dataclass
class Demo:
    config: DemoConfig
    runs: dict[str, Run]
    base: Run  # untrained: any run before its first step
    problems: list[Problem]


def prepare(config: DemoConfig) -> Demo:
    """Compose every training run exactly as `python -m bcr.train experiment=...` would, and check it, before the first one starts."""
    for name in ("steps", "problems", "roomy", "shared"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if unknown := [name for name in config.parts if name not in PARTS]:
        raise ValueError(f"parts has {unknown[0]!r}; there are {', '.join(PARTS)}.")
    runs = {name: prepare_training(training_config(config, name)) for name in PARTS if name in config.parts}
    if "bcr" not in runs:
        raise ValueError("parts lacks 'bcr'; there is nothing to compare without it.")
    base = prepare_training(training_config(config, "bcr"))
    heldout = ArithmeticProblems("heldout")
    return Demo(config, runs, base, [heldout[index] for index in range(config.problems)])


def training_config(config: DemoConfig, name: str) -> TrainConfig:
    overrides = [f"experiment={PARTS[name].experiment}", f"output={config.output}/runs/{name}", f"seed={config.seed}"]
    overrides += ["device=cpu", "overwrite=true"]
    overrides += [f"{key}={value}" for key, value in (("steps", config.steps), ("threads", config.threads)) if value is not None]
    return compose("train", overrides, TrainConfig)


def run(demo: Demo) -> None:
    """Part after part; whatever is finished is on the disk, also when Ctrl-C ends it early."""
    console = DemoConsole(sum(costs(demo)), 1 + len(demo.runs))
    results = Results(demo.config, console)
    try:
        with console:
            console.part("The base", f"{demo.config.problems} held-out problems, solved by a small model that was taught to be verbose.")
            results.begin("base", "The base")
            measure(demo, "base", demo.base, results)
            for name, training in demo.runs.items():
                part = PARTS[name]
                console.part(part.title, part.sentence)
                results.begin(name, part.title)
                train(training, console.training(training.config.steps, training.config.steps * part.step_cost, part.every))
                measure(demo, name, training, results)
            results.summary["complete"] = True
    finally:  # an interrupt too: what is done is written and said before the program ends
        results.write(final=True)
        conclude(results)


def costs(demo: Demo) -> list[float]:
    """Declared seconds of the base's measurement and of each part."""
    share = len(demo.problems) / 600 * len(demo.config.sizes) / 4
    parts = [run.config.steps * PARTS[name].step_cost + PARTS[name].evaluation_cost * share for name, run in demo.runs.items()]
    return [BASE_COST * share, *parts]


class Results:
    """summary.json, evaluations.jsonl, the picture and the report of the demo's folder, as far as they are known."""

    def __init__(self, config: DemoConfig, console: DemoConsole) -> None:
        self.config, self.console, self.folder = config, console, Path(config.output)
        for name in ("summary.json", "evaluations.jsonl", "report.html", "demo.png"):
            (self.folder / name).unlink(missing_ok=True)
        for name in PARTS:
            if name not in config.parts:
                shutil.rmtree(self.folder / "runs" / name, ignore_errors=True)
        self.summary: dict[str, Any] = {"runs": {}, "complete": False}
        self.at_one: dict[str, list[Judged]] = {}  # the rollouts at N = 1

    def begin(self, name: str, title: str) -> None:
        self.summary["runs"][name] = {"title": title, "folder": None if name == "base" else f"runs/{name}"}

    def write(self, final: bool = False) -> None:
        """Everything known so far; the picture at the end alone."""
        if {"bcr_tight", "same_cap"} <= self.at_one.keys():
            self.summary["hardest"] = hardest_problems(self.at_one["bcr_tight"], self.at_one["same_cap"], cap=22)
        self.summary["said"] = conclusions(self.summary, self.config.sizes)
        self.summary["seconds"] = round(self.console.elapsed, 1)
        self.summary["estimates"] = self.console.estimates
        (self.folder / "summary.json").write_text(json.dumps(self.summary, indent=2) + "\n")
        if final and "bcr" in self.summary:
            before_and_after(self.summary, self.config.sizes, self.folder / "demo.png")
        write_report(self.folder)

    def keep(self, name: str, size: int, judged: Sequence[Judged], run: Run) -> None:
        with (self.folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            for rollout in judged[:KEPT_BUNDLES]:
                file.write(json.dumps({"run": name, "size": size, **transcript(rollout, None, run.task.dialect)}) + "\n")


def measure(demo: Demo, name: str, run: Run, results: Results) -> None:
    """Measures by N at a roomy budget; for the base and BCR also accuracy by N under one fixed shared budget."""
    config, console, dialect = demo.config, results.console, run.task.dialect
    params = SamplingParams(1.0, 1, dialect.stop_token_ids, config.seed)
    fixed = [(size, Budget(total=config.shared)) for size in config.sizes if name in ("base", "bcr")]
    cells = [(size, Budget(per_problem=config.roomy)) for size in config.sizes] + fixed
    whole = BASE_COST if name == "base" else PARTS[name].evaluation_cost
    cost = whole / len(cells) * len(demo.problems) / 600 * len(config.sizes) / 4
    roomy: dict[str, Any] = {}
    shared: list[float] = []
    with GraderPool(1) as pool:
        for size, budget in cells:
            judged = evaluate_cell(run.sampler, dialect, pool, demo.problems, size, budget, params, console.within(cost))
            console.advance(cost)
            found = summarise(judged)
            if budget.total is not None:
                shared.append(found["accuracy"])
                continue
            roomy[str(size)] = found
            console.say(f"  N = {size}: accuracy {found['accuracy']:.1%}, {found['tokens_per_problem']:.1f} tokens per problem")
            if size in KEPT_SIZES:
                results.keep(name, size, judged, run)
            if size == 1:
                results.at_one[name] = judged
    if shared:
        results.summary.setdefault("shared_budget", {"tokens": config.shared, "sizes": config.sizes})[name] = shared
        console.say(f"  {config.shared} tokens shared by all N: {', '.join(f'{accuracy:.1%}' for accuracy in shared)}")
    results.summary[name] = roomy
    results.write()


def conclude(results: Results) -> None:
    """The table, what it shows and what not, and where everything lies."""
    console, summary, folder = results.console.console, results.summary, results.folder
    if "base" in summary:
        console.print(results_table(summary, results.config.sizes))
    for sentence in summary["said"]:
        console.print(f"- {sentence}")
    if not summary["complete"]:
        console.print("[bold]Stopped early[/]: these are the parts that were finished.")
    files = [file for file in ("report.html", "demo.png", "summary.json", "runs") if (folder / file).exists()]
    console.print(f"{spoken(summary['seconds'])}. In {folder}: {', '.join(files)}")


if __name__ == "__main__":
    launch("demo", DemoConfig, prepare, run)
