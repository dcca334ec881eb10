"""A training step on many devices, on paper: `bcr.analysis.costs` says what one device computes, here is what they tell each other.

    sampling    each device its own bundles, from whole weights
    exchange    every rollout to every rank, as Python lists
    learning    FSDP2 (`bcr.parallel.sharding`): for each pack the weights are gathered layer by layer, forward and again backward, and
                float32 gradients reduced, behind the arithmetic except for one layer's share; `waiting` is what does not fit behind it
    gathering   whole working weights for the sampler, once; of adapters theirs alone
    updating    AdamW on the shards

A collective is a ring: every rank receives its size times (R - 1) / R, R - 1 hops one after the other. Across nodes the rings of a node
share its adapters. Grading runs on the hosts' CPUs and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log2

from bcr.analysis.costs import (
    GIB,
    Device,
    Load,
    layer_parameters,
    learning_seconds,
    learnt,
    memory,
    packs,
    parameters,
    peak,
    sampling_seconds,
    slots,
)
from bcr.model import DecoderConfig

EXCHANGE_BYTES = 16  # of a token on its way: id, log-prob, and what pickle writes around them
HOST_SECONDS = 1e-7  # to pickle and read back one token's id and log-prob; `bench.scaling` measures it
UPDATE_BYTES = 34  # of a weight in an update: master and two moments read and written, gradient read, working weight written, norm
WORTH = 1.5  # a doubling of the devices that makes a step less than this much faster is where scaling stops


@dataclass
class Fabric:
    """What joins the devices: GB/s for each in one direction, and of the hosts; seconds of a hop; the share of the rates that is reached.

    NVIDIA's DGX H100 data sheet: NVLink 900 GB/s in both directions together, eight ConnectX-7 adapters of 400 Gb/s in a node of eight.
    The hosts' rate (gloo over TCP), hop and efficiency are assumed.
    """

    per_node: int = 8
    inside: float = 450.0
    between: float = 50.0
    hosts: float = 2.0
    hop: float = 5e-6
    efficiency: float = 0.8


@dataclass(frozen=True)
class Row:
    """One count of devices, `shard` of them to each copy of the shards. `seconds` by phase (empty where the run does not fit), `memory`:
    GiB on each."""

    devices: int
    shard: int
    memory: float
    seconds: dict[str, float]

    @property
    def step(self) -> float:
        return sum(self.seconds.values())


def ring_seconds(fabric: Fabric, size: float, ranks: int, messages: int = 1) -> float:
    """An all-gather of `size` bytes in all, or a reduce-scatter of them, cut into so many collectives."""
    if ranks == 1:
        return 0.0
    rate = fabric.inside if ranks <= fabric.per_node else min(fabric.inside, fabric.between * fabric.per_node)
    return size * (ranks - 1) / ranks / (rate * fabric.efficiency * 1e9) + messages * (ranks - 1) * fabric.hop


def replicas_seconds(fabric: Fabric, size: float, copies: int, messages: int) -> float:
    """An all-reduce of `size` bytes between copies in different nodes, over each device's own adapter (HSDP)."""
    if copies == 1:
        return 0.0
    return 2 * size * (copies - 1) / copies / (fabric.between * fabric.efficiency * 1e9) + 2 * messages * (copies - 1) * fabric.hop


def wire_seconds(config: DecoderConfig, load: Load, fabric: Fabric) -> float:
    """What learning moves in a step: for each pack every layer's weights twice, the root's (embedding and head) once, and all gradients (of
    adapters theirs alone); with HSDP the sums over the copies once, after the last pack."""
    count, layers = parameters(config), config.num_hidden_layers
    root = count - layers * layer_parameters(config)
    gathered = ring_seconds(fabric, load.weight_bytes * (2 * count - root), load.sharded, 2 * layers + 1)
    reduced = ring_seconds(fabric, 4 * learnt(config, load), load.sharded, layers + 1)
    between = replicas_seconds(fabric, 4 * learnt(config, load) / load.sharded, load.devices // load.sharded, layers + 1)
    return packs(load) * (gathered + reduced) + between


def step_seconds(config: DecoderConfig, load: Load, device: Device, fabric: Fabric) -> dict[str, float]:
    """Seconds of a step by phase, one after the other."""
    arithmetic, wires = learning_seconds(config, load, device), wire_seconds(config, load, fabric)
    tokens = load.rollouts * load.length
    several = load.devices > 1
    whole = ring_seconds(fabric, load.weight_bytes * learnt(config, load), load.sharded, config.num_hidden_layers + 1)
    return {
        "sampling": sampling_seconds(config, load, device),
        "exchange": (EXCHANGE_BYTES / (fabric.hosts * 1e9) + HOST_SECONDS) * tokens if several else 0.0,
        "learning": arithmetic,
        "waiting": max(0.0, wires - arithmetic) + min(wires, arithmetic) / (config.num_hidden_layers + 1),
        "gathering": whole,
        "updating": UPDATE_BYTES * learnt(config, load) / load.sharded / (device.bandwidth * 1e12),
    }


def shard_of_a_node(fabric: Fabric, devices: int) -> int:
    """Over how many of so many devices a run shards where nothing is said: those of one node, all nodes having as many."""
    return max(count for count in range(1, fabric.per_node + 1) if devices % count == 0)


def row(config: DecoderConfig, load: Load, device: Device, fabric: Fabric) -> Row:
    """With the weights sharded as `load` says, or else over a node, as is the default, or over as many nodes as it takes to fit."""
    shard = min(load.devices, load.shard or shard_of_a_node(fabric, load.devices))
    while True:
        tried = replace(load, shard=shard)
        needed = peak(memory(config, tried)) / GIB
        fits = slots(config, tried) >= 1 and needed <= device.memory_gib - device.reserve
        if fits or load.shard or load.devices % (2 * shard):
            return Row(load.devices, shard, needed, step_seconds(config, tried, device, fabric) if fits else {})
        shard *= 2


def rows(config: DecoderConfig, load: Load, device: Device, fabric: Fabric, counts: Sequence[int]) -> list[Row]:
    """The same work on ever more devices."""
    return [row(config, replace(load, devices=count), device, fabric) for count in counts]


def stop(found: Sequence[Row]) -> Row | None:
    """The row after which more devices no longer pay: the next one is less than WORTH times faster for each doubling. None: none fits."""
    fitting = [row for row in found if row.seconds]
    for this, following in pairwise(fitting):
        if this.step / following.step < WORTH ** log2(following.devices / this.devices):
            return this
    return fitting[-1] if fitting else None


def remedies(config: DecoderConfig, load: Load, device: Device, fabric: Fabric) -> dict[str, tuple[float, float]]:
    """What could be changed on so many devices -> (rollouts a second, GiB on each device; 0 and what it needs where it does not fit)."""
    changed = {
        "as it is": load,
        "`sampling.max_batch` and its cache x 4": replace(load, in_flight=4 * load.in_flight, cache_bytes=4 * load.cache_bytes),
        "`bundles.per_step` x 4": replace(load, rollouts=4 * load.rollouts),
        "a group's rollouts on several ranks": replace(load, group=1),
    }
    if load.devices > fabric.per_node:
        changed["shards over all GPUs instead of a node's"] = replace(load, shard=load.devices)
    found = {name: throughput(config, change, device, fabric) for name, change in changed.items()}
    if config.num_experts:
        found["all experts in one product, under a device graph"] = throughput(config, load, replace(device, launch=0.0), fabric)
    if load.devices > 1:
        found["sampling beside learning, on ranks of its own"] = asynchronous(config, load, device, fabric)
    return found


def throughput(config: DecoderConfig, load: Load, device: Device, fabric: Fabric) -> tuple[float, float]:
    found = row(config, load, device, fabric)
    return (load.rollouts / found.step if found.seconds else 0.0), found.memory


def asynchronous(config: DecoderConfig, load: Load, device: Device, fabric: Fabric) -> tuple[float, float]:
    """The best split into ranks that sample and ranks that learn from the step before; the slower side sets the pace."""
    best = (0.0, 0.0)
    for learners in range(1, load.devices):
        learning = replace(load, devices=learners, shard=learners)
        sampling = replace(load, devices=load.devices - learners)
        held, drawn = memory(config, learning), memory(config, sampling)
        sampler = sum(drawn[part] for part in ("KV cache", "logits while sampling")) + load.weight_bytes * parameters(config)
        learner = sum(size for part, size in held.items() if part not in ("sampler copy", "KV cache", "logits while sampling"))
        needed = max(sampler, learner) / GIB
        if needed <= device.memory_gib - device.reserve and slots(config, sampling) >= 1:
            apart = {**step_seconds(config, learning, device, fabric), "sampling": 0.0}
            pace = max(sum(apart.values()), sampling_seconds(config, sampling, device))
            best = max(best, (load.rollouts / pace, needed))
    return best
