"""Do the times that `bcr.plan` computes fit what a machine takes? `python -m bench.scaling [bench/results/scaling_cpu.json]`

First the machine's own numbers: the rate of a square product, the bytes of weights that a product of 16 rows reads in a second, what a pass
through a layer takes that has next to nothing to compute, the shares of these rates that learning and decoding reach for one shape, and
what it takes to pickle and read back a token for the exchange of rollouts. Then, for other shapes and other work, a step's sampling and
learning as `bcr.analysis.costs` computes them beside the time they take (the median of three, after a warm-up; float32, one thread). With
a file name the points are written there; tests hold the model against the committed ones.
"""

from __future__ import annotations

import json
import pickle
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from bcr.analysis.costs import LAYER_KERNELS, Device, Load, learning_seconds, sampling_seconds, seconds
from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.packs import Example, make_pack, pack_examples
from bcr.learner.step import OptimizerConfig, optimizer_step
from bcr.model import Decoder, DecoderConfig
from bcr.records import Request, Segment
from bcr.sampler import Sampler, SamplingParams
from bench._protocol import matmul_peak, seconds_of

NO_STOP = 10**9  # outside every vocabulary: a completion ends at its budget


def qwen3(width: int, layers: int, **mixture: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        head_dim=min(64, width),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **mixture,
    )


def work(bundles: int, prompt: int, budget: int, checkpointing: bool = False) -> Load:
    return Load(
        weight_bytes=4, checkpointing=checkpointing, pack_tokens=2048, prompt=prompt, budget=budget,
        rollouts=8 * bundles, in_flight=64, cache_bytes=2**30, group=8,
    )  # fmt: skip


MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
EMPTY = (qwen3(16, 8), work(1, 8, 64))  # its passes are nothing but what a pass takes
GAUGE = (qwen3(384, 4), work(2, 64, 48))  # the shares of the rates are taken from it
CASES = {
    "4 layers 256 wide, 32 rollouts": (qwen3(256, 4), work(4, 64, 64)),
    "6 layers 512 wide, 8 rollouts": (qwen3(512, 6), work(1, 128, 48)),
    "6 layers 512 wide, 16 rollouts, checkpointing": (qwen3(512, 6), work(2, 64, 32, checkpointing=True)),
    "4 layers 384 wide, 2 of 8 experts, 16 rollouts": (qwen3(384, 4, **MIXTURE), work(2, 64, 48)),
}


def sampling(model: Decoder, load: Load) -> float:
    """Seconds to draw the rollouts of a step."""
    requests = [Request(str(k), [k + 1] * load.prompt, load.budget) for k in range(load.bundles)]
    sampler = Sampler(model, max_batch=load.in_flight, cache_mb=int(load.cache_bytes / 2**20))
    return median(lambda: sampler.generate(requests, SamplingParams(n=load.group, stop_token_ids=(NO_STOP,))))


def learning(model: Decoder, load: Load) -> float:
    """Seconds of an update from as many rollouts, all with a signal."""
    model.activation_checkpointing = load.checkpointing
    one = Example([1] * load.prompt, [2] * load.budget, [-7.0] * load.budget, [Segment(0, 0, load.budget)], [1.0])
    examples, loss, optimizer = [one] * load.rollouts, LossConfig(), OptimizerConfig().build(model)
    total = Denominators.of(example.segments for example in examples)

    def update() -> None:
        groups = pack_examples(examples, load.pack_tokens, share_prompts=False)  # as the costs count
        packs = (make_pack(group, loss, total, share_prompts=False) for group in groups)
        optimizer_step(model, optimizer, packs, loss.rule(), temperature=1.0, lr=1e-6, grad_clip=1.0)

    return median(update)


def exchanging(tokens: int = 100_000) -> float:
    """Seconds for each token of a rollout to be pickled and read back."""
    record = (list(range(tokens)), [-0.1 * k for k in range(tokens)])
    return median(lambda: pickle.loads(pickle.dumps(record))) / tokens


def thin_rate(size: int = 4096, rows: int = 16) -> float:
    """Bytes of weights a second in the products of decoding."""
    weight, hidden = torch.randn(size, size), torch.randn(rows, size)
    return weight.nbytes / min(seconds_of(lambda: torch.nn.functional.linear(hidden, weight), "cpu") for _ in range(10))


def median(run: Any, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def machine() -> dict[str, float]:
    """The fields of a `Device`, and `exchange`."""
    shape, load = EMPTY
    empty = sampling(Decoder(shape).init_weights(0), load)
    rates = {
        "tflops": matmul_peak("cpu", torch.float32) / 1e12,
        "bandwidth": thin_rate() / 1e12,
        "launch": empty / (load.budget * shape.num_hidden_layers * LAYER_KERNELS),
    }
    rates["captured"] = rates["launch"]  # a CPU captures nothing
    shape, load = GAUGE
    model, ideal = Decoder(shape).init_weights(0), Device(**rates | {"learning": 1.0, "decoding": 1.0})
    learned = learning(model, load)
    rates["learning"] = share(learned, lambda value: learning_seconds(shape, load, replace(ideal, learning=value)))
    known = replace(ideal, learning=rates["learning"])
    drawn = sampling(model, load)
    rates["decoding"] = share(drawn, lambda value: sampling_seconds(shape, load, replace(known, decoding=value)))
    return rates | {"exchange": exchanging()}


def share(measured: float, computed: Callable[[float], float]) -> float:
    """Of the rate, with which the computed time is the measured one: computed(x) = a + b / x."""
    whole, half = computed(1.0), computed(0.5)
    return (half - whole) / (measured - whole + (half - whole))


def table(record: dict[str, Any]) -> list[str]:
    """The points of a record beside what the model computes today, in Markdown."""
    device = Device(**{name: value for name, value in record["machine"].items() if name != "exchange"})
    lines = ["| shape | phase | computed | measured | ratio |", "|---|---|---|---|---|"]
    for point in record["points"]:
        computed = seconds(DecoderConfig(**point["shape"]), Load(**point["load"]), device)
        for phase, measured in point["measured"].items():
            ratio = computed[phase] / measured
            lines.append(f"| {point['name']} | {phase} | {computed[phase]:.2f} | {measured:.2f} | {ratio:.2f} |")
    return lines


def main(target: str | None = None) -> None:
    torch.set_num_threads(1)
    numbers, points = machine(), []
    for name, (shape, load) in CASES.items():
        model = Decoder(shape).init_weights(0)
        measured = {"sampling": sampling(model, load), "learning": learning(model, load)}
        sizes = {field.name: getattr(shape, field.name) for field in fields(shape) if field.name not in ("rope_scaling", "mlp_only_layers")}
        points.append({"name": name, "shape": sizes, "load": asdict(load), "measured": measured})
    record = {"bench": "scaling", "torch": torch.__version__, "cpu": platform.machine(), "threads": 1, "machine": numbers, "points": points}
    if target:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(json.dumps(record, indent=1) + "\n")
    print(f"{1e3 * numbers['tflops']:.0f} GFLOP/s, {numbers['learning']:.0%} of it in learning; {1e6 * numbers['launch']:.0f} us a kernel;")
    print(f"{1e3 * numbers['bandwidth']:.1f} GB/s of weights, {numbers['decoding']:.0%} of it in decoding; ", end="")
    print(f"{1e9 * numbers['exchange']:.0f} ns to exchange a token\n")
    print("\n".join(table(record)))
    print(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
