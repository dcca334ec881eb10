"""`python -m bcr.warmstart`: supervised training of the base reasoner of the embedded world.

The teacher writes verbose chains of thought; the model learns to reason like it, at every N it will meet later. The checkpoint
that ships with the package (`bcr/assets/arithmetic-base`) was made by this program with its default config.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bcr.analysis.measures import summarise
from bcr.evaluate import evaluate_cell
from bcr.model import Decoder, DecoderConfig
from bcr.model.attention import PackedAttention
from bcr.runtime.checkpoint import save_checkpoint
from bcr.runtime.config import as_plain, command_line, launch
from bcr.runtime.host import settle_in
from bcr.runtime.model_card import model_card
from bcr.sampler import Sampler, SamplingParams
from bcr.tasks.arithmetic import MARKERS, MAX_PROBLEMS, VOCABULARY, ArithmeticDialect, ArithmeticProblems, build_tokenizer, teach
from bcr.tasks.bundles import Budget, BundleStream, check_sizes, mixture
from bcr.tasks.grader_pool import GraderPool
from bcr_kernels import linear_logprob


@dataclass
class ModelSizes:
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 1024


@dataclass
class Teacher:
    slip: float = 0.07
    direct: float = 0.05


@dataclass
class Stage:
    steps: int = 300
    lr: float = 3e-3
    sizes: list[int] = field(default_factory=lambda: [1])
    shares: list[float] | None = None


@dataclass
class WarmStartConfig:
    output: str = "outputs/warmstart"
    seed: int = 0
    threads: int | None = None
    model: ModelSizes = field(default_factory=ModelSizes)
    teacher: Teacher = field(default_factory=Teacher)
    stages: list[Stage] = field(default_factory=lambda: [Stage()])
    tokens_per_step: int = 7500
    warmup_steps: int = 50
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    log_every: int = 20


def prepare(config: WarmStartConfig) -> WarmStartConfig:
    """Every check that needs no work; creates the output folder."""
    if not config.stages or config.tokens_per_step < 1:
        raise ValueError("stages and tokens_per_step: there must be at least one stage and one token a step.")
    DecoderConfig(vocab_size=len(VOCABULARY), **vars(config.model))
    for stage in config.stages:
        check_sizes(mixture(stage.sizes, stage.shares), Budget(per_problem=1), MAX_PROBLEMS)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    return config


def warm_start(config: WarmStartConfig) -> tuple[Decoder, list[float]]:
    """Train from random weights; returns the model and the loss [nats per response token] of every step."""
    dialect = ArithmeticDialect(build_tokenizer())
    model = Decoder(DecoderConfig(vocab_size=len(VOCABULARY), **vars(config.model))).init_weights(config.seed)
    betas = config.betas[0], config.betas[1]
    optimizer = torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=config.weight_decay, fused=True)
    losses: list[float] = []
    begun, total_steps = time.perf_counter(), sum(stage.steps for stage in config.stages)
    for number, stage in enumerate(config.stages):
        examples = teacher_examples(dialect, mixture(stage.sizes, stage.shares), f"{config.seed}/{number}", config.teacher)
        for step in range(stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * schedule(step, stage.steps, config.warmup_steps)
            batch: list[tuple[list[int], list[int]]] = []
            while sum(len(response) for _, response in batch) < config.tokens_per_step:
                batch.append(next(examples))
            loss = mean_nll(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if step % config.log_every == 0 or step == stage.steps - 1:
                seconds = time.perf_counter() - begun
                left = seconds / len(losses) * (total_steps - len(losses))
                where = f"stage {number + 1} step {step + 1}/{stage.steps}"
                print(f"{where}  loss {losses[-1]:.4f}  {seconds:.0f} s, {left:.0f} s left", flush=True)
    return model, losses


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth: a factor on the learning rate."""
    progress = min(1.0, step / max(1, steps))
    return min(1.0, (step + 1) / max(1, warmup)) * (0.55 + 0.45 * math.cos(math.pi * progress))


def teacher_examples(
    dialect: ArithmeticDialect, sizes: dict[int, float], seed: str, teacher: Teacher
) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (prompt, response) token lists."""
    rng = random.Random(seed)
    stream = BundleStream(ArithmeticProblems("train", rng.randrange(2**31)), dialect, sizes, Budget(per_problem=1), rng.randrange(2**31))
    while True:
        (bundle,) = stream.take(1)
        words = [
            word
            for marker, problem in zip(MARKERS, bundle.problems, strict=False)
            for word in (marker, *teach(problem.question, rng, teacher.slip, teacher.direct))
        ]
        yield bundle.prompt_ids, dialect.encode([*words, "<eos>"])


def mean_nll(model: Decoder, batch: list[tuple[list[int], list[int]]]) -> Tensor:
    """Mean negative log-likelihood of the response tokens, all examples in one packed forward pass."""
    inputs, positions, targets, lengths = (list[int]() for _ in range(4))
    for prompt, response in batch:
        tokens = prompt + response
        inputs += tokens[:-1]
        positions += range(len(tokens) - 1)
        targets += [-100] * (len(prompt) - 1) + response
        lengths.append(len(tokens) - 1)
    hidden = model(torch.tensor(inputs), torch.tensor(positions), PackedAttention(lengths, torch.device("cpu")))
    target = torch.tensor(targets)
    scored = (target != -100).nonzero().squeeze(1)
    return -linear_logprob(hidden[scored], model.head_weight, target[scored]).logprob.mean()


def measure(model: Decoder, dialect: ArithmeticDialect) -> dict[str, float]:
    """Accuracy and tokens per problem on 600 held-out problems at every N the base is meant for."""
    problems = [ArithmeticProblems("heldout")[index] for index in range(600)]
    figures: dict[str, float] = {}
    with GraderPool(1) as pool:
        for size in (1, 2, 3, 6):
            params = SamplingParams(1.0, 1, dialect.stop_token_ids)
            summary = summarise(evaluate_cell(Sampler(model), dialect, pool, problems, size, Budget(per_problem=130), params))
            figures |= {f"accuracy at N = {size}": summary["accuracy"], f"tokens per problem at N = {size}": summary["tokens_per_problem"]}
    return figures


def run(config: WarmStartConfig) -> None:
    settle_in(config.threads)
    model, losses = warm_start(config)
    dialect = ArithmeticDialect(build_tokenizer())
    figures = {"final loss [nats per response token]": sum(losses[-20:]) / len(losses[-20:]), **measure(model, dialect)}
    card = model_card("Arithmetic base: a verbose reasoner for the embedded world", command_line("warmstart"), figures, as_plain(config))
    folder = save_checkpoint(model, dialect.tokenizer, dialect.stop_token_ids, Path(config.output), card)
    print(f"saved to {folder}")
    for name, value in figures.items():
        print(f"  {name}: {value:.4g}")


if __name__ == "__main__":
    launch("warmstart", WarmStartConfig, prepare, run)
