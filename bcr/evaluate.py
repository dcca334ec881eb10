"""`python -m bcr.evaluate [key=value ...]`: a checkpoint at several N and budgets, with the sampler, dialect and grader of training."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bcr.analysis.measures import summarise
from bcr.assemble import Task, assemble, build_grader, build_sampler, check_context, data_set, read_problems
from bcr.records import Problem, Verdict
from bcr.runtime.config import as_plain, launch
from bcr.runtime.host import choose_device, settle_in
from bcr.runtime.schema import EvaluateConfig
from bcr.sampler import Sampler, SamplingParams
from bcr.tasks.bundles import Budget, as_request, check_sizes, consecutive_bundles, cyclic_bundles, mixture
from bcr.tasks.dialect import Dialect
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.judging import Grader, Judged, judge

ENDLESS = 600  # problems of the embedded world where their number is not given


@dataclass
class Evaluation:
    """A checked config and what it was turned into."""

    config: EvaluateConfig
    task: Task
    sets: dict[str, list[Problem]]
    cells: list[tuple[int, Budget]]
    sampler: Sampler
    grader: GraderPool
    params: SamplingParams


def prepare(config: EvaluateConfig) -> Evaluation:
    """Check everything and load the model; ValueError with one sentence otherwise."""
    if config.problems is not None and config.problems < 1:
        raise ValueError(f"problems is {config.problems}; it must be at least 1.")
    budgets = [Budget(total=tokens) for tokens in config.budgets] + [Budget(per_problem=tokens) for tokens in config.budgets_per_problem]
    if not config.sizes or not budgets:
        raise ValueError("sizes, budgets and budgets_per_problem: there must be at least one N and one budget.")
    settle_in(config.threads)
    listed = {entry: data_set(entry, config.data) for entry in config.benchmarks}
    first, *others = listed or {"data": config.data}
    task = assemble(config.model, listed.get(first, config.data), config.dialect, config.seed, choose_device(config.device))
    problems = task.finite or [task.problems[index] for index in range(config.problems or ENDLESS)]
    sets = {first: problems[: config.problems], **{entry: read_problems(listed[entry])[: config.problems] for entry in others}}
    for budget in budgets:
        check_sizes(mixture(config.sizes), budget, task.dialect.max_problems)
        for asked in sets.values():
            check_context(task, config.sizes, budget, asked)
    if config.cyclic and max(config.sizes) > min(map(len, sets.values())):
        raise ValueError(f"sizes has N = {max(config.sizes)}, more than there are problems; cyclic bundles would ask one twice at once.")
    chosen = config.sampling
    params = SamplingParams(
        chosen.temperature, 1, task.dialect.stop_token_ids, config.seed, top_k=chosen.top_k, top_p=chosen.top_p, min_p=chosen.min_p
    )
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    cells = [(size, budget) for budget in budgets for size in config.sizes]
    sampler, grader = build_sampler(task.model, config.sampling), build_grader(config.grading)
    return Evaluation(config, task, sets, cells, sampler, grader, params)


def evaluate_cell(
    sampler: Sampler,
    dialect: Dialect,
    grader: Grader,
    problems: Sequence[Problem],
    size: int,
    budget: Budget,
    params: SamplingParams,
    progress: Callable[[int, int], None] | None = None,
    cyclic: bool = False,
) -> list[Judged]:
    """All problems once, `size` to a prompt, in their order; or each at every position of a prompt, if `cyclic`."""
    bundles = (cyclic_bundles if cyclic else consecutive_bundles)(problems, size, dialect, budget, "evaluate")
    groups = sampler.generate([as_request(bundle) for bundle in bundles], params, progress)
    return [judged for group in judge(bundles, groups, dialect, grader) for judged in group]


def evaluate(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One record a cell: data set, N, budget, how many verdicts of each kind, and the measures of `bcr.analysis.measures.summarise`."""
    task, cells = evaluation.task, []
    with evaluation.grader as grader, Progress(console=Console(stderr=True), transient=True) as progress:
        for name, (size, budget) in itertools.product(evaluation.sets, evaluation.cells):
            bar = progress.add_task(f"{Path(name).stem}, N = {size}, budget {described(budget)}", total=None)

            def show(done: int, total: int, bar: Any = bar) -> None:
                progress.update(bar, completed=done, total=total)

            judged = evaluate_cell(
                evaluation.sampler,
                task.dialect,
                grader,
                evaluation.sets[name],
                size,
                budget,
                evaluation.params,
                show,
                evaluation.config.cyclic,
            )
            counted = Counter(verdict for one in judged for verdict in one.verdicts)
            verdicts = {verdict.value: counted[verdict] for verdict in Verdict}
            asked = {"data": name, "n": size, "budget": budget.total, "budget_per_problem": budget.per_problem}
            cells.append({**asked, "verdicts": verdicts, **summarise(judged)})
            progress.remove_task(bar)
    return cells


def described(budget: Budget) -> str:
    return f"{budget.total} shared" if budget.total is not None else f"{budget.per_problem} a problem"


def table(cells: Sequence[dict[str, Any]]) -> Table:
    """The results for people."""
    result = Table("data", "N", "budget", "accuracy", "tokens/problem", "checks/problem", "truncated")
    for cell in cells:
        result.add_row(
            Path(cell["data"]).stem,
            str(cell["n"]),
            described(Budget(cell["budget"], cell["budget_per_problem"])),
            f"{cell['accuracy']:.1%} ± {cell['accuracy_se']:.1%}",
            f"{cell['tokens_per_problem']:.1f}",
            f"{cell['checks_per_problem']:.2f}",
            f"{cell['truncated']:.0%}",
        )
    return result


def verdict_table(cells: Sequence[dict[str, Any]]) -> Table:
    """How many verdicts of each kind; they add up to the problems asked."""
    result = Table("data", "N", "budget", *(verdict.value for verdict in Verdict), "problems")
    for cell in cells:
        counts = [str(cell["verdicts"][verdict.value]) for verdict in Verdict]
        budget = described(Budget(cell["budget"], cell["budget_per_problem"]))
        result.add_row(Path(cell["data"]).stem, str(cell["n"]), budget, *counts, str(cell["problems"]))
    return result


def run(evaluation: Evaluation) -> None:
    cells = evaluate(evaluation)
    Console().print(table(cells), verdict_table(cells))
    if evaluation.config.output:
        result = {"config": as_plain(evaluation.config), "cells": cells}
        Path(evaluation.config.output).write_text(json.dumps(result, indent=2) + "\n")
        print(f"written: {evaluation.config.output}")


if __name__ == "__main__":
    launch("evaluate", EvaluateConfig, prepare, run)
