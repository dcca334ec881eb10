"""`python -m bcr.plan [key=value ...]`: whether a training run fits a GPU, part by part, and how long a step takes, before anything starts.

It takes the keys of `bcr.train` and some of its own: `+gpu=...` (a key of GPUS, or single numbers such as `+device_numbers.memory_gib=47`),
`+gpus=8`, and `+scale=[1,2,4,8]`, which prints how a step's time falls with the number of GPUs instead (docs/scaling.md). It reads a
checkpoint's config.json and no weights; the checkpoints of the recipes are known without the hub.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from bcr.analysis.costs import DECODE_EFFICIENCY, GIB, GPUS, LEARNING_MFU, Device, Load, kv_bytes, memory, parameters, peak, seconds, slots
from bcr.analysis.scaling import Fabric, remedies, rows, shard_of_a_node, stop
from bcr.assemble import model_folder
from bcr.model import DecoderConfig
from bcr.model.huggingface import read_config
from bcr.runtime.config import launch
from bcr.runtime.schema import ModelConfig, TrainConfig
from bcr.tasks.bundles import Budget

KNOWN = {  # config.json of the recipes' checkpoints
    "hbx/JustRL-DeepSeek-1.5B": DecoderConfig(
        vocab_size=151_936, head_dim=128, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=131_072, qk_norm=False, qkv_bias=True,
    ),
    "Qwen/Qwen3-4B-Thinking-2507": DecoderConfig(
        vocab_size=151_936, head_dim=128, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=262_144, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-0.6B": DecoderConfig(
        vocab_size=151_936, head_dim=128, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=40_960, tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-30B-A3B-Thinking-2507": DecoderConfig(
        vocab_size=151_936, head_dim=128, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=262_144,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
    ),
}  # fmt: skip


@dataclass
class PlanConfig(TrainConfig):
    """A training config, the device it is planned for, and what the data is taken to look like."""

    gpu: str = "h100"
    gpus: int = 1
    scale: list[int] = field(default_factory=list)  # numbers of GPUs to compare; empty: plan for `gpus`
    fabric: Fabric = field(default_factory=Fabric)
    device_numbers: Device | None = None
    question_tokens: int = field(default=200)  # of one problem in a prompt: a generous mean over MATH and DeepMath


@dataclass
class Plan:
    """A config that can be planned."""

    config: PlanConfig
    shape: DecoderConfig
    device: Device
    load: Load


def prepare(config: PlanConfig) -> Plan:
    """Raises ValueError, with one sentence of advice, for a run that cannot fit."""
    for section in (config.advantage, config.loss, config.optimizer, config.reward):
        section.check()
    if config.gpus < 1:
        raise ValueError(f"gpus is {config.gpus}; it must be at least 1.")
    if config.gpu not in GPUS:
        raise ValueError(f"gpu is {config.gpu!r}; it must be one of {', '.join(GPUS)}, or give device_numbers.")
    device = config.device_numbers or GPUS[config.gpu]
    shape = shape_of(config.model)
    load = load_of(config, shape)
    if load.length > shape.max_position_embeddings:
        raise ValueError(
            f"a rollout may have {load.length} tokens, prompt included; the model's context is {shape.max_position_embeddings}."
        )
    if wrong := [count for count in config.scale if count < 1]:
        raise ValueError(f"scale has {wrong[0]}; a number of GPUs is at least 1.")
    check_shards(config)
    if config.scale:
        return Plan(config, shape, device, load)
    load = replace(load, shard=min(load.devices, load.shard or shard_of_a_node(config.fabric, load.devices)))
    if not fits(shape, load, device):
        raise ValueError(advice(config, shape, load, device))
    return Plan(config, shape, device, load)


def check_shards(config: PlanConfig) -> None:
    """As a run does at its start; in a comparison smaller numbers of GPUs shard over all of them."""
    if config.parallel.samplers:
        raise ValueError(
            f"parallel.samplers is {config.parallel.samplers}; a plan is for GPUs that sample and learn in turn, so leave it out: "
            "what sampling beside learning gains at its best is the last line of +scale=[...]."
        )
    shard = config.parallel.shard_size
    if shard is None:
        return
    if shard < 1:
        raise ValueError(f"parallel.shard_size is {shard}; it must be at least 1.")
    for devices in config.scale or [config.gpus]:
        if devices > 1 and devices % (min(shard, devices) if config.scale else shard):
            raise ValueError(f"parallel.shard_size is {shard}; it must divide the number of GPUs, which is {devices}.")


def shape_of(model: ModelConfig) -> DecoderConfig:
    """The sizes of the model, without its weights."""
    if model.random is not None:
        return DecoderConfig(**vars(model.random))
    if model.path is None:
        raise ValueError("model.path and model.random: give exactly one of them.")
    if model.path in KNOWN:
        return KNOWN[model.path]
    return read_config(model_folder(model.path))


def load_of(config: PlanConfig, shape: DecoderConfig) -> Load:
    """The largest N is planned for, with every rollout as long as its budget."""
    size = max(config.bundles.sizes)
    budget = Budget(config.bundles.budget, config.bundles.budget_per_problem)
    adapter = config.model.lora.adapter(config.model.path)
    load = Load(
        weight_bytes=4 if config.model.dtype == "float32" else 2,
        checkpointing=config.model.activation_checkpointing,
        pack_tokens=config.optimizer.pack_tokens,
        prompt=100 + size * config.question_tokens,
        budget=max(budget.tokens(n) for n in config.bundles.sizes),
        rollouts=config.bundles.per_step * config.bundles.group,
        in_flight=config.sampling.max_batch,
        cache_bytes=(config.sampling.cache_mb or 0) * 2**20,
        devices=config.gpus,
        shard=config.parallel.shard_size,
        group=config.bundles.group,
        trained=adapter.numbers(shape) if adapter else None,
    )
    if config.sampling.cache_mb is None:  # what is free: here, what all in flight can use
        return replace(load, cache_bytes=(load.in_flight + 1) * kv_bytes(shape, load))
    return load


def fits(shape: DecoderConfig, load: Load, device: Device) -> bool:
    return slots(shape, load) >= 1 and peak(memory(shape, load)) <= (device.memory_gib - device.reserve) * GIB


def advice(config: PlanConfig, shape: DecoderConfig, load: Load, device: Device) -> str:
    """One sentence: what is too much, and the first of the usual remedies, each on top of the one before, with which it fits."""
    parts = memory(shape, load)
    largest = ", ".join(f"{part} {size / GIB:.1f}" for part, size in sorted(parts.items(), key=lambda item: -item[1])[:3])
    room = device.memory_gib - device.reserve
    said = f"the run needs {peak(parts) / GIB:.1f} GiB on each {device.name}, which has {room:.1f} to give (largest: {largest})"
    if slots(shape, load) < 1:
        said = f"sampling.cache_mb is {load.cache_bytes / 2**20:.0f}, too little for a prompt and a rollout of {load.length} tokens"
    small_cache = cache_mb(shape, load)
    usual: list[tuple[str, dict[str, Any]]] = [
        (f"optimizer.pack_tokens={load.length}", {"pack_tokens": load.length}),
        ("model.activation_checkpointing=true", {"checkpointing": True}),
        (f"sampling.cache_mb={small_cache}", {"cache_bytes": small_cache * 2**20}),
    ]
    for count in (2, 4, 8, 16, 32, 64):
        of_a_node = shard_of_a_node(config.fabric, count)
        for shard in sorted({of_a_node, count}):
            unsaid = shard == (config.parallel.shard_size or of_a_node)
            remedy = f"{count} GPUs (sharded)" if unsaid else f"{count} GPUs (sharded) and parallel.shard_size={shard}"
            usual.append((remedy, {"devices": count, "shard": shard}))
    remedies: list[str] = []
    changed = load
    for remedy, change in usual:
        if all(getattr(changed, name) == value for name, value in change.items()) or change.get("devices", load.devices) < load.devices:
            continue
        changed = replace(changed, **change)
        remedies = [*(kept for kept in remedies if "devices" not in change or "(sharded)" not in kept), remedy]
        if fits(shape, changed, device):
            return f"{said}; it fits with {' and '.join(remedies)}."
    return f"{said}; nothing that this program knows makes it fit: take a smaller model or budget."


def cache_mb(shape: DecoderConfig, load: Load) -> int:
    """A cache for 16 rollouts in flight."""
    return int(17 * kv_bytes(shape, load) / 2**20) + 1


def show_scale(plan: Plan) -> None:
    """Markdown, as it stands in docs/scaling.md."""
    shape, load, device, fabric = plan.shape, plan.load, plan.device, plan.config.fabric
    found = rows(shape, load, device, fabric, plan.config.scale)
    phases = ("sampling", "exchange", "learning", "waiting", "gathering", "updating")
    print(f"| {device.name} | shards | GiB on each | {' | '.join(phases)} | seconds a step | efficiency | measured |")
    print("|---" * (len(phases) + 6) + "|")
    first = next((row for row in found if row.seconds), None)
    for row in found:
        if not row.seconds or first is None:
            print(f"| {row.devices} | {row.shard} | {row.memory:.0f}: too much |{' |' * (len(phases) + 2)} no |")
            continue
        efficiency = first.step * first.devices / (row.step * row.devices)
        spent = " | ".join(brief(row.seconds[phase]) for phase in phases)
        print(f"| {row.devices} | {row.shard} | {row.memory:.0f} | {spent} | {brief(row.step)} | {efficiency:.0%} | no |")
    end = stop(found)
    if end is None:
        print("\nIt fits on none of them.")
        return
    beyond = next((row for row in found if row.devices > end.devices), None)
    here = beyond or end
    largest = max(here.seconds, key=lambda phase: here.seconds[phase])
    verdict = f"Scaling stops at {end.devices}" if beyond else f"No end of scaling up to {end.devices}"
    print(f"\n{verdict}; on {here.devices} {largest} takes {here.seconds[largest] / here.step:.0%} of the step. A change there:\n")
    print("| change | rollouts a second | gain | GiB on each |\n|---|---|---|---|")
    options = remedies(shape, replace(load, devices=here.devices), device, fabric)
    before = options["as it is"][0]
    for change, (pace, needed) in options.items():
        print(
            f"| {change} | {brief(pace)} | {pace / before:.2f} | {needed:.0f} |"
            if pace
            else f"| {change} | does not fit | | {needed:.0f} |"
        )


def brief(value: float) -> str:
    """Three digits where they mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def run(plan: Plan) -> None:
    if plan.config.scale:
        show_scale(plan)
        return
    shape, load, device = plan.shape, plan.load, plan.device
    parts, times = memory(shape, load), seconds(shape, load, device)
    shards = f", shards over {load.sharded}" if load.sharded < load.devices else ""
    table = Table("part", "GiB", title=f"{parameters(shape) / 1e9:.2f} B parameters on {load.devices} x {device.name}{shards}")
    for part, size in parts.items():
        table.add_row(part, f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("peak", f"{peak(parts) / GIB:.2f}")
    table.add_row("the device gives", f"{device.memory_gib - device.reserve:.2f}")
    clock = Table("phase of a step", "seconds")
    for phase, spent in times.items():
        clock.add_row(phase, f"{spent:.0f}" if spent >= 10 else f"{spent:.2f}")
    total = sum(times.values())
    clock.add_row("together", f"{total:.0f}" if total >= 10 else f"{total:.2f}")
    clock.add_row(f"all {plan.config.steps} steps", f"{total * plan.config.steps / 3600:.1f} hours")
    Console().print(table, clock)
    print(
        f"{load.rollouts} rollouts a step, {slots(shape, load)} in flight on each GPU, "
        f"each taken to be {load.prompt} + {load.budget} tokens long."
    )
    print(
        f"Times assume {LEARNING_MFU:.0%} of the peak arithmetic in learning and {DECODE_EFFICIENCY:.0%} of the peak traffic in decoding; "
        "they are no measurements."
    )


if __name__ == "__main__":
    launch("plan", PlanConfig, prepare, run, config_name="train")
