"""`python -m bcr.train [key=value ...]`: Batched Contextual Reinforcement, the whole loop on one screen.

bundles -> rollouts -> verdicts -> advantages -> packs -> one optimizer step -> the sampler has the new weights, for it never had others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bcr.analysis.measures import summarise
from bcr.analysis.transcripts import telling_rollouts
from bcr.assemble import Task, assemble, build_bundles, build_grader, build_sampler, check_context
from bcr.learner.credit import make_examples
from bcr.learner.losses import Denominators
from bcr.learner.packs import Example, make_pack, pack_examples
from bcr.learner.step import optimizer_step
from bcr.model import Decoder
from bcr.model.ops import implementations
from bcr.runtime.checkpoint import save_checkpoint
from bcr.runtime.clock import Clock
from bcr.runtime.config import as_plain, command_line, launch
from bcr.runtime.console import StepConsole, TrainingConsole
from bcr.runtime.host import choose_device, settle_in
from bcr.runtime.model_card import model_card
from bcr.runtime.outputs import RunFiles, check_trackers, make_room, write_lines
from bcr.runtime.schema import TrainConfig
from bcr.sampler import Sampler, SamplingParams
from bcr.tasks.arrangement import ArrangedBundles
from bcr.tasks.bundles import Budget, BundleStream, as_request, mixture
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.judging import Judged, judge


@dataclass
class Run:
    """A config that has passed every check, and what it was turned into."""

    config: TrainConfig
    task: Task
    bundles: BundleStream | ArrangedBundles
    sampler: Sampler
    grader: GraderPool
    params: SamplingParams
    device: torch.device


def prepare(config: TrainConfig) -> Run:
    """Check everything and load the model. Raises ValueError, with one sentence, before anything expensive starts."""
    for section in (config.reward, config.advantage, config.loss, config.optimizer):
        section.check()
    positive = {"steps": config.steps, "bundles.per_step": config.bundles.per_step, "checkpoint_every": config.checkpoint_every}
    for name, value in positive.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if config.bundles.group < 2:
        raise ValueError(f"bundles.group is {config.bundles.group}; a group needs 2 rollouts or more to be compared.")
    if not config.sampling.temperature > 0:
        raise ValueError(f"sampling.temperature is {config.sampling.temperature}; training samples need a positive one.")
    for name, off in {"top_k": 0, "top_p": 1.0, "min_p": 0.0}.items():
        if getattr(config.sampling, name) != off:
            raise ValueError(
                f"sampling.{name} is {getattr(config.sampling, name)}; training needs it off ({off}): tokens drawn from a cut distribution "
                "do not have the log-probs that the loss compares with."
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"torchrun started {os.environ['WORLD_SIZE']} processes; training runs on one (--nproc_per_node=1).")
    check_trackers(config)
    device = choose_device(config.device)
    settle_in(config.threads)
    budget = Budget(config.bundles.budget, config.bundles.budget_per_problem)
    task = assemble(config.model, config.data, config.dialect, config.seed, device)
    sizes = mixture(config.bundles.sizes, config.bundles.shares)
    bundles = build_bundles(task, config.bundles, sizes, budget, config.seed)
    check_context(task, sizes, budget)
    params = SamplingParams(config.sampling.temperature, config.bundles.group, task.dialect.stop_token_ids, config.seed)
    sampler, grader = build_sampler(task.model, config.sampling), build_grader(config.grading)
    make_room(Path(config.output), config.overwrite)
    if task.excluded:
        write_lines(Path(config.output) / "excluded.jsonl", map(vars, task.excluded))
    return Run(config, task, bundles, sampler, grader, params, device)


def train(run: Run, console: StepConsole | None = None) -> None:
    """The loop. Everything it learns from is sampled in the same step (on-policy). `console` is told of every step."""
    config, model, dialect = run.config, run.task.model, run.task.dialect
    optimizer = config.optimizer.build(model)
    clock = Clock()
    with run.grader, RunFiles(config) as files, console or TrainingConsole(config.steps, title(config), machinery(model)) as told:
        for step in range(config.steps):
            with clock("sampling"):
                bundles = run.bundles.take(config.bundles.per_step)
                groups = run.sampler.generate([as_request(bundle) for bundle in bundles], run.params)
            with clock("grading"):
                judged = judge(bundles, groups, dialect, run.grader)
                examples = make_examples(judged, config.advantage, config.reward)
            with clock("learning"):
                total = Denominators.of(example.segments for example in examples)
                live = [example for example in examples if example.has_signal]
                packs = (make_pack(pack, config.loss, total, run.device) for pack in pack_examples(live, config.optimizer.pack_tokens))
                sums = optimizer_step(
                    model,
                    optimizer,
                    packs,
                    config.loss.rule(),
                    temperature=config.sampling.temperature,
                    lr=config.optimizer.rate(step),
                    grad_clip=config.optimizer.grad_clip,
                )
                run.sampler.on_weights_changed()
            flat = [rollout for group in judged for rollout in group]
            metrics = step_metrics(flat, live, len(examples), sums)
            files.write("metrics", {"step": step + 1, **metrics})
            files.write("timings", {"step": step + 1, **clock.seconds})
            for record in telling_rollouts(judged, examples, dialect, config.logging.rollouts):
                files.write("rollouts", {"step": step + 1, **record})
            told.step(step + 1, {**metrics, **clock.seconds})
            last = step + 1 == config.steps
            if last or (config.checkpoint_every and (step + 1) % config.checkpoint_every == 0):
                folder = Path(config.output) / "checkpoints" / f"step-{step + 1:06d}"
                card = model_card(f"{title(config)}, step {step + 1}", command_line("train"), metrics, as_plain(config))
                save_checkpoint(model, dialect.tokenizer, dialect.stop_token_ids, folder, card)
    print(f"checkpoint: {folder}")


def step_metrics(judged: Sequence[Judged], live: Sequence[Example], total: int, sums: Mapping[str, float]) -> dict[str, Any]:
    """What a step's line in metrics.jsonl says: the measures of its rollouts and of its update. A pure function of the run's seed."""
    tokens = max(1.0, sums.get("tokens", 0.0))
    return {
        **summarise(judged),
        "without_signal": 1 - len(live) / total,
        "loss": sums.get("loss_sum", 0.0),
        "grad_norm": sums["grad_norm"],
        "updated": sums["updated"],
        "clipped": (sums.get("clipped_low", 0.0) + sums.get("clipped_high", 0.0)) / tokens,
        "dlogprob_mean": sums.get("mismatch_abs_sum", 0.0) / tokens,
        "dlogprob_max": sums.get("max_mismatch_abs", 0.0),
        "dlogprob_tokens": sums.get("tokens", 0.0),
        "mismatch_kl": sums.get("mismatch_kl_sum", 0.0) / tokens,
    }


def machinery(model: Decoder) -> str:
    """One line that says on what the run computes, and by which implementation of each operation."""
    weight = model.embed_tokens.weight
    chosen = implementations(weight.device.type, weight.dtype, model.config.head_dim)
    return f"{weight.device.type}, {str(weight.dtype).removeprefix('torch.')}; {chosen}"


def title(config: TrainConfig) -> str:
    """One line that says what is trained how."""
    what = "BCR" if max(config.bundles.sizes) > 1 else "GRPO"
    sizes = ", ".join(map(str, config.bundles.sizes))
    batch = f"{config.bundles.per_step} bundles x {config.bundles.group} rollouts"
    budget = f"{config.bundles.budget} shared" if config.bundles.budget else f"{config.bundles.budget_per_problem} a problem"
    reward = "" if config.reward.kind == "accuracy" else f", {config.reward.kind} reward"
    return f"{what}: N = {sizes}, budget {budget}, {batch}, {config.advantage.scope} credit{reward}"


if __name__ == "__main__":
    launch("train", TrainConfig, prepare, train)
