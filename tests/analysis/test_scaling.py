"""A step on many devices: the model against measured points, against limits that must hold, and the document against what is printed."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcr import plan
from bcr.analysis.costs import Device, Load, body_parameters, parameters, seconds
from bcr.analysis.scaling import HOST_SECONDS, Fabric, Row, remedies, replicas_seconds, ring_seconds, row, rows, step_seconds, stop
from bcr.model import DecoderConfig
from bcr.plan import KNOWN, PlanConfig, prepare
from bcr.runtime.config import compose
from bench.scaling import table

ROOT = Path(__file__).parents[2]
POINTS = ROOT / "bench" / "results" / "scaling_cpu.json"
DOCUMENT = ROOT / "docs" / "scaling.md"
H100, FABRIC = Device(), Fabric()
SMALL = KNOWN["hbx/JustRL-DeepSeek-1.5B"]
WORK = Load(
    weight_bytes=2, checkpointing=True, pack_tokens=8192, prompt=700, budget=5120,
    rollouts=1024, in_flight=64, cache_bytes=12 * 2**30, group=8,
)  # fmt: skip


def test_computed_times_are_those_measured():
    """Within a factor of two for shapes and work that the machine's numbers were not taken from; half of the points within a fifth."""
    record = json.loads(POINTS.read_text())
    device = Device(**{name: value for name, value in record["machine"].items() if name != "exchange"})
    ratios = []
    for point in record["points"]:
        computed = seconds(DecoderConfig(**point["shape"]), Load(**point["load"]), device)
        ratios += [computed[phase] / measured for phase, measured in point["measured"].items()]
    assert len(ratios) == 8
    assert all(1 / 2 < ratio < 2 for ratio in ratios), ratios
    assert sum(1 / 1.2 < ratio < 1.2 for ratio in ratios) >= 4, ratios
    assert record["machine"]["exchange"] == pytest.approx(HOST_SECONDS, rel=0.5)


def test_weights_of_the_known_models():
    """Their model cards: 1.8 B, 4.0 B, 30.5 B of which 3.3 B work on a token."""
    mixture = KNOWN["Qwen/Qwen3-30B-A3B-Thinking-2507"]
    billions = [parameters(SMALL), parameters(KNOWN["Qwen/Qwen3-4B-Thinking-2507"]), parameters(mixture), parameters(mixture, 8)]
    assert [count / 1e9 for count in billions] == pytest.approx([1.8, 4.0, 30.5, 3.3], rel=0.02)
    assert body_parameters(mixture) == parameters(mixture) - 2 * 151_936 * 2048


def test_collectives():
    """A ring moves (R - 1) / R of the bytes; across nodes it is bound by the adapters that the node's ranks share."""
    free = replace(FABRIC, hop=0.0, efficiency=1.0)
    assert ring_seconds(free, 450e9, 8) == pytest.approx(7 / 8)
    assert ring_seconds(free, 400e9, 16) == pytest.approx(15 / 16)
    assert ring_seconds(replace(free, between=1.0), 8e9, 16) == pytest.approx(15 / 16)
    assert ring_seconds(FABRIC, 1e9, 1) == replicas_seconds(FABRIC, 1e9, 1, 1) == 0
    assert replicas_seconds(free, 50e9, 2, 1) == pytest.approx(1)
    assert ring_seconds(FABRIC, 0, 8, messages=10) == pytest.approx(10 * 7 * FABRIC.hop)


def test_one_device_says_nothing_to_anybody():
    alone = step_seconds(SMALL, WORK, H100, FABRIC)
    assert {phase: alone[phase] for phase in ("exchange", "waiting", "gathering")} == {"exchange": 0, "waiting": 0, "gathering": 0}
    assert {phase: alone[phase] for phase in ("sampling", "learning")} == seconds(SMALL, WORK, H100)


@given(st.sampled_from(sorted(KNOWN)), st.integers(0, 8), st.integers(1, 64))
def test_no_count_of_devices_beats_perfect_scaling(name, doublings, bundles):
    """And a step is never faster than its latest token: every token reads the weights once, however many devices there are."""
    shape, load = KNOWN[name], replace(WORK, rollouts=8 * bundles)
    alone, many = (step_seconds(shape, replace(load, devices=2**k), H100, FABRIC) for k in (0, doublings))
    assert sum(many.values()) * 2**doublings >= sum(alone.values()) * (1 - 1e-9)
    assert many["sampling"] >= load.budget * 2 * parameters(shape, 1) / 3.35e12 * 0.9


def test_where_scaling_stops():
    def found(*steps):
        return [Row(2**k, 1, 10.0, {"sampling": step} if step else {}) for k, step in enumerate(steps)]

    assert stop(found(100, 60, 35, 30, 12)).devices == 4
    assert stop(found(None, 100, 50)).devices == 4
    assert stop(found(100, 67)).devices == 1
    assert stop(found(None, None)) is None


def test_shards_spread_until_a_run_fits():
    mixture, h200 = KNOWN["Qwen/Qwen3-30B-A3B-Thinking-2507"], Device(memory_gib=140.0, bandwidth=4.8)
    load = replace(WORK, devices=32)
    found = row(mixture, load, h200, FABRIC)
    assert found.shard > 8
    assert found.seconds
    assert not row(mixture, load, H100, FABRIC).seconds
    assert row(SMALL, load, H100, FABRIC).shard == 8


def test_changes_are_compared_with_the_run_as_it_is():
    load = replace(WORK, devices=32)
    options = remedies(SMALL, load, H100, FABRIC)
    assert options["as it is"][0] == pytest.approx(1024 / rows(SMALL, WORK, H100, FABRIC, [32])[0].step)
    mixture, h200 = KNOWN["Qwen/Qwen3-30B-A3B-Thinking-2507"], Device(memory_gib=140.0, bandwidth=4.8)
    found = remedies(mixture, load, h200, FABRIC)
    assert found["all experts in one product, under a device graph"][0] > 5 * found["as it is"][0]
    assert options["`bundles.per_step` x 4"][0] > options["as it is"][0]


@pytest.mark.parametrize("command", re.findall(r"^    python -m bcr\.plan (.*\+scale=.*)$", DOCUMENT.read_text(), re.MULTILINE))
def test_the_document_shows_what_its_command_prints(command, capsys):
    plan.run(prepare(compose("train", shlex.split(command), PlanConfig)))
    assert f"{command}\n\n{capsys.readouterr().out}" in DOCUMENT.read_text()


def test_the_document_shows_the_committed_points():
    assert "\n".join(table(json.loads(POINTS.read_text()))) in DOCUMENT.read_text()


def test_a_scale_of_no_devices_is_refused():
    with pytest.raises(ValueError, match=r"scale has 0; a number of GPUs is at least 1"):
        prepare(compose("train", ["experiment=bcr_1.5b", "+scale=[1,0]"], PlanConfig))
