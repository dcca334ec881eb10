"""Where a step of the demo's training goes: a workload of `bench.train_step`.

Fixed work: the shipped base, the same twelve bundles each time (weights are put back). One warm-up, then the median. Beside each phase
stands its arithmetic limit: the multiply-adds that it cannot avoid over the matmul rate measured in the same run.
"""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bcr.learner.credit import make_examples
from bcr.learner.losses import Denominators
from bcr.learner.packs import make_pack, pack_examples, places
from bcr.learner.step import optimizer_step
from bcr.runtime.clock import Clock
from bcr.runtime.config import compose
from bcr.runtime.schema import TrainConfig
from bcr.sampler import Sampler
from bcr.tasks.bundles import as_request
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.judging import judge
from bcr.train import Run, prepare
from bench._protocol import matmul_peak


def one_step(run: Run, sampler: Sampler, pool: GraderPool, clock: Clock) -> dict[str, int]:
    """The body of `bcr.train.train`; returns how many tokens went through the model."""
    config = run.config
    run.rollouts.bundles.load_state_dict({"bundles_made": 0, "problems_consumed": 0})
    optimizer = config.optimizer.build(run.task.model)
    with clock("sampling"):
        bundles = run.rollouts.bundles.take(config.bundles.per_step)
        groups = sampler.generate([as_request(bundle) for bundle in bundles], run.rollouts.params)
    with clock("grading"):
        examples = make_examples(judge(bundles, groups, run.task.dialect, pool), config.advantage, config.reward)
    with clock("learning"):
        total = Denominators.of(example.segments for example in examples)
        live = [example for example in examples if example.has_signal]
        packs = (make_pack(pack, config.loss, total) for pack in pack_examples(live, config.optimizer.pack_tokens))
        optimizer_step(run.task.model, optimizer, packs, config.loss.rule(), temperature=1.0, lr=config.optimizer.lr, grad_clip=1.0)
    sampled = sum(len(rollout.token_ids) for group in groups for rollout in group)
    prefilled = sum(len(bundle.prompt_ids) for bundle in bundles)
    return {"sampled": sampled, "prefilled": prefilled, "learned": places(live)}


def demo(repeats: int) -> dict[str, Any]:
    """Prints the profile and the phases; returns what was measured."""
    with tempfile.TemporaryDirectory() as folder, GraderPool(1) as pool:
        run = prepare(compose("train", [f"output={folder}", "device=cpu"], TrainConfig))
        model = run.task.model
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        sampler, clock = Sampler(model), Clock()
        seconds: dict[str, list[float]] = {}
        for repeat in range(repeats + 1):
            model.load_state_dict(start)
            tokens = one_step(run, sampler, pool, clock)
            if repeat:
                for phase, value in clock.seconds.items():
                    seconds.setdefault(phase, []).append(value)
        model.load_state_dict(start)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            one_step(run, sampler, pool, Clock())

    matrix = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.embed_tokens.weight.numel()
    flops = {
        "sampling": 2 * matrix * (tokens["sampled"] + tokens["prefilled"]),
        "grading": 0,
        "learning": 6 * matrix * tokens["learned"],
    }
    peak = matmul_peak("cpu", torch.float32)
    median = {phase.removeprefix("seconds_"): statistics.median(values) for phase, values in seconds.items()}
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=45))
    work = f"{tokens['sampled']} tokens sampled, {tokens['learned']} learned from"
    print(f"{work}; {torch.get_num_threads()} threads, {peak / 1e9:.0f} GFLOP/s\n")
    print(f"{'phase':10s} {'seconds':>8s} {'limit':>8s} {'share':>6s}")
    for phase, value in median.items():
        print(f"{phase:10s} {value:8.3f} {flops[phase] / peak:8.3f} {flops[phase] / peak / value:6.0%}")
    print(f"{'step':10s} {sum(median.values()):8.3f}")
    return {"seconds": median, "step": sum(median.values()), **tokens, "flop": flops, "matmul_peak": peak}
