"""Planning: every recipe is planned without its weights, what cannot fit is refused with advice that helps."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bcr.analysis.costs import GIB, memory, peak
from bcr.analysis.scaling import rows
from bcr.model import Decoder
from bcr.model.lora import TARGETS, Adapter, attach
from bcr.plan import PlanConfig, prepare, run
from bcr.runtime.config import compose, config_folder
from bcr.tasks.bundles import Budget

RECIPES = ["bcr_1.5b", "bcr_4b", "qwen3_0.6b"]


def planned(*overrides):
    return prepare(compose("train", list(overrides), PlanConfig))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("control", ["", "_single", "_same_cap"])
@pytest.mark.parametrize("gpus", [1, 4, 8])
def test_every_recipe_is_planned(recipe, control, gpus):
    overrides = [f"experiment={recipe}{control}", f"+gpus={gpus}"]
    if recipe == "bcr_4b" and gpus == 1:
        with pytest.raises(ValueError, match="it fits with"):
            planned(*overrides)
        return
    plan = planned(*overrides)
    assert plan.load.devices == gpus
    assert plan.load.weight_bytes == 2


def test_adapters_are_planned_for_a_small_gpu():
    """Where training the weights themselves, with all else the same, does not fit."""
    plan = planned("experiment=qwen3_0.6b_lora", "+gpu=rtx_4090")
    with torch.device("meta"):
        model = attach(Decoder(plan.shape), Adapter(32, 64.0, TARGETS))
    assert plan.load.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    with pytest.raises(ValueError, match="the run needs"):
        planned("experiment=qwen3_0.6b_lora", "+gpu=rtx_4090", "model.lora.rank=null", "model.lora.alpha=null")
    alone, on_four = (memory(plan.shape, replace(plan.load, devices=count, shard=count)) for count in (1, 4))
    assert on_four["masters"] == pytest.approx(alone["masters"] / 4)
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    assert on_four["frozen shards"] == pytest.approx(2 * frozen / 4)
    assert on_four["sampler copy"] == alone["weights"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_controls_ask_as_many_problems_and_differ_only_where_they_must(recipe):
    ours, single, cap = (planned(f"experiment={recipe}{control}", "+gpus=4").config for control in ("", "_single", "_same_cap"))
    for control in (single, cap):
        assert control.bundles.per_step * 1 == ours.bundles.per_step * 3
        assert control.bundles.count == ours.bundles.count * 3
        assert (control.bundles.sizes, control.bundles.group) == ([1], ours.bundles.group)
        assert (control.model, control.data, control.loss, control.advantage) == (ours.model, ours.data, ours.loss, ours.advantage)
        assert (control.sampling, control.optimizer, control.steps) == (ours.sampling, ours.optimizer, ours.steps)
    assert Budget(cap.bundles.budget).tokens(1) == round(ours.bundles.budget / 3)
    assert single.bundles.budget == ours.bundles.budget


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_is_the_papers_and_what_is_ours(recipe):
    text = (config_folder() / "experiment" / f"{recipe}.yaml").read_text()
    assert "PAPER" in text
    assert "OURS" in text


@pytest.mark.parametrize(
    ("overrides", "sharded"),
    [
        (["+gpus=4"], 4),
        (["+gpus=16"], 8),
        (["+gpus=12"], 6),
        (["+gpus=16", "+fabric.per_node=4"], 4),
        (["+gpus=16", "parallel.shard_size=16"], 16),
        (["+gpus=8", "parallel.shard_size=2"], 2),
    ],
)
def test_the_plan_shards_as_a_run_does(overrides, sharded):
    """Over one machine where nothing else is said; and the comparison of numbers of GPUs says the same of the same number."""
    plan = planned("experiment=bcr_1.5b", *overrides)
    assert plan.load.sharded == sharded
    scale = planned("experiment=bcr_1.5b", *overrides[1:], f"+scale=[{plan.load.devices}]")
    [row] = rows(scale.shape, scale.load, scale.device, scale.config.fabric, scale.config.scale)
    assert (row.shard, row.memory * GIB) == (sharded, pytest.approx(peak(memory(plan.shape, plan.load))))


def test_more_machines_hold_what_one_cannot_where_the_shards_spread():
    """What is advised on small GPUs, word for word, fits."""
    overrides = ["experiment=bcr_4b", "+device_numbers={name: small, memory_gib: 30, tflops: 100, bandwidth: 1, reserve: 1}"]
    with pytest.raises(ValueError, match=r"it fits with .*16 GPUs \(sharded\) and parallel\.shard_size=16\.$") as refusal:
        planned(*overrides)
    changes = re.findall(r"[a-z_]+\.[a-z_]+=\w+", str(refusal.value).partition("it fits with")[2])
    planned(*overrides, "+gpus=16", *changes)
    with pytest.raises(ValueError, match="it fits with"):
        planned(*overrides, "+gpus=16", *changes[:-1])


def test_the_advice_helps():
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as refusal:
        planned("experiment=bcr_1.5b", "+gpu=rtx_4090")
    sentence = str(refusal.value)
    gpus = re.search(r"(\d+) GPUs \(sharded\)", sentence)
    changes = re.findall(r"[a-z_]+\.[a-z_]+=\w+", sentence)
    assert gpus
    assert changes
    planned("experiment=bcr_1.5b", "+gpu=rtx_4090", f"+gpus={gpus[1]}", *changes)


@pytest.mark.parametrize(
    ("overrides", "phrase"),
    [
        (["experiment=bcr_4b"], "the run needs"),
        (["experiment=bcr_1.5b", "sampling.cache_mb=100"], "sampling.cache_mb is 100, too little"),
        (["experiment=bcr_1.5b", "+gpu=tpu"], "gpu is 'tpu'; it must be one of h100"),
        (["experiment=bcr_1.5b", "+gpus=0"], "gpus is 0"),
        (["experiment=bcr_1.5b", "+gpus=4", "parallel.shard_size=3"], "parallel.shard_size is 3; it must divide"),
        (["experiment=bcr_1.5b", "parallel.shard_size=0", "+scale=[2]"], "parallel.shard_size is 0; it must be"),
        (
            ["experiment=bcr_1.5b", "+gpus=4", "parallel.samplers=1"],
            "parallel.samplers is 1; a plan is for GPUs that sample and learn in turn",
        ),
        (["experiment=bcr_1.5b", "loss.kind=ppo"], "loss.kind"),
        (["bundles.budget=2000"], "the model's context is 1024"),
        (["model=folder", "model.path=no/such/folder"], "neither a folder nor a hub repository"),
    ],
)
def test_what_cannot_be_is_refused(overrides, phrase):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        planned(*overrides)
    assert phrase in str(refusal.value)


def test_numbers_of_ones_own(capsys):
    plan = planned("experiment=qwen3_0.6b", "+device_numbers={name: mine, memory_gib: 64, tflops: 100, bandwidth: 1, reserve: 1}")
    run(plan)
    shown = capsys.readouterr().out
    assert "0.60 B parameters on 1 x mine" in shown
    for part in ("weights", "masters", "moments", "gradients", "activations", "KV cache", "head", "sampler copy", "peak"):
        assert part in shown


def test_the_program_refuses_with_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bcr.plan", "experiment=bcr_4b"], capture_output=True, text=True, timeout=100, cwd=tmp_path
    )
    assert done.returncode == 2
    assert re.fullmatch(r"bcr\.plan: the run needs [^\n]+\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
