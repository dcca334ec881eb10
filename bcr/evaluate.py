"""`python -m bcr.evaluate [key=value ...]`: a checkpoint at several N and budgets, with the sampler, dialect and grader of training."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bcr.analysis.cell import budget_curve, describe, scaling_laws
from bcr.assemble import Task, assemble, build_grader, build_sampler, check_context, data_set, read_problems, sampling_params
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
    first, *others = listed or {config.data.path or config.data.kind: config.data}
    task = assemble(config.model, listed.get(first, config.data), config.dialect, config.seed, choose_device(config.device))
    problems = task.finite or [task.problems[index] for index in range(config.problems or ENDLESS)]
    sets = {first: problems[: config.problems], **{entry: read_problems(listed[entry])[: config.problems] for entry in others}}
    for budget in budgets:
        check_sizes(mixture(config.sizes), budget, task.dialect.max_problems)
        for asked in sets.values():
            check_context(task, config.sizes, budget, asked)
    if config.cyclic and max(config.sizes) > min(map(len, sets.values())):
        raise ValueError(f"sizes has N = {max(config.sizes)}, more than there are problems; cyclic bundles would ask one twice at once.")
    if config.samples < 1:
        raise ValueError(f"samples is {config.samples}; it must be at least 1.")
    if config.cut_at and min(config.cut_at) < 1:
        raise ValueError(f"cut_at is {config.cut_at}; a completion can be cut at 1 token or later.")
    params = sampling_params(config.sampling, config.samples, task.dialect, config.seed)
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
    """All problems, `size` to a prompt, in their order; or each at every position of a prompt, if `cyclic`. `params.n` rollouts each."""
    bundles = (cyclic_bundles if cyclic else consecutive_bundles)(problems, size, dialect, budget, "evaluate")
    groups = sampler.generate([as_request(bundle) for bundle in bundles], params, progress)
    return [judged for group in judge(bundles, groups, dialect, grader) for judged in group]


def evaluate(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One record a cell: data set, N, budget, and all that `bcr.analysis.cell` says of its rollouts."""
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
            cell = {"data": name, "n": size, "budget": budget.total, "budget_per_problem": budget.per_problem}
            cut_at = evaluation.config.cut_at
            curve = budget_curve(judged, cut_at, task.dialect, grader) if cut_at else {}
            cells.append({**cell, **describe(judged, task.dialect), **curve})
            progress.remove_task(bar)
    return cells


def law_lines(cells: Sequence[dict[str, Any]]) -> list[str]:
    """The task-scaling laws for people."""
    lines = []
    for law in scaling_laws(cells):
        error = "" if law["exponent_se"] is None else f" ± {law['exponent_se']:.3f}"
        falls = "fall with every N" if law["monotone"] else "do not fall with every N"
        where = f"{Path(law['data']).stem}, {described(Budget(None, law['budget_per_problem']))}"
        lines.append(f"{where}: tokens a problem ~ {law['scale']:.1f} N^-({law['exponent']:.3f}{error}); they {falls}.")
    return lines


def described(budget: Budget) -> str:
    return f"{budget.total} shared" if budget.total is not None else f"{budget.per_problem} each"


def table(cells: Sequence[dict[str, Any]]) -> Table:
    """The results for people. Tokens and checks are those of a problem; the interval is the bootstrap's, at 95 %.

    pass@k is that of the largest k, and of the cells whose problems were asked so often (`cyclic` asks each N times at N).
    """
    samples = max((key for cell in cells for key in cell.get("pass_at_k", {})), key=int, default=None)
    passed = [] if samples is None else [f"pass@{samples}"]
    result = Table("data", "N", "budget", "accuracy", *passed, "tokens", "checks", "truncated", box=SIMPLE, pad_edge=False)
    for cell in cells:
        found = cell.get("pass_at_k", {})
        result.add_row(
            *asked(cell),
            f"{cell['accuracy']:.1%} [{100 * cell['accuracy_interval'][0]:.1f}, {100 * cell['accuracy_interval'][1]:.1f}]",
            *([] if samples is None else [f"{found[samples]:.1%}" if samples in found else "-"]),
            f"{cell['tokens_per_problem']:.1f}",
            f"{cell['checks_per_problem']:.2f}",
            f"{cell['truncated']:.0%}",
        )
    return result


def verdict_table(cells: Sequence[dict[str, Any]]) -> Table:
    """How many verdicts of each kind, of those that occur."""
    kinds = [verdict.value for verdict in Verdict if any(cell["verdicts"][verdict.value] for cell in cells)]
    result = Table("data", "N", "budget", *kinds, box=SIMPLE, pad_edge=False)
    for cell in cells:
        result.add_row(*asked(cell), *(str(cell["verdicts"][kind]) for kind in kinds))
    return result


def asked(cell: dict[str, Any]) -> tuple[str, str, str]:
    return Path(cell["data"]).stem, str(cell["n"]), described(Budget(cell["budget"], cell["budget_per_problem"]))


def run(evaluation: Evaluation) -> None:
    cells = evaluate(evaluation)
    if evaluation.config.output:
        result = {"config": as_plain(evaluation.config), "cells": cells, "scaling_laws": scaling_laws(cells)}
        Path(evaluation.config.output).write_text(json.dumps(result, indent=2) + "\n")
    Console().print(table(cells), verdict_table(cells))
    print(*law_lines(cells), sep="\n")
    if evaluation.config.output:
        print(f"written: {evaluation.config.output}")


if __name__ == "__main__":
    launch("evaluate", EvaluateConfig, prepare, run)
