"""The warm start lowers the loss, and the base that ships is what its model card says."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bcr.assemble import model_folder
from bcr.evaluate import evaluate
from bcr.evaluate import prepare as prepare_evaluation
from bcr.model import load_pretrained
from bcr.model.attention import PackedAttention
from bcr.runtime.config import compose
from bcr.runtime.schema import EvaluateConfig
from bcr.warmstart import WarmStartConfig, prepare, warm_start

BASE = model_folder("builtin/arithmetic-base")


def test_a_short_warm_start_lowers_the_loss(tmp_path):
    overrides = [f"output={tmp_path}", "stages=[{steps: 12, lr: 0.003, sizes: [1, 2]}]", "tokens_per_step=600", "warmup_steps=3"]
    model, losses = warm_start(prepare(compose("warmstart", overrides, WarmStartConfig)))
    assert losses[-1] < 0.85 * losses[0]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize(("override", "phrase"), [("stages=[]", "at least one stage"), ("stages=[{sizes: [9]}]", "N = 9")])
def test_bad_input_is_one_sentence(tmp_path, override, phrase):
    with pytest.raises(ValueError, match=phrase):
        prepare(compose("warmstart", [f"output={tmp_path / 'never'}", override], WarmStartConfig))
    assert not (tmp_path / "never").exists()


def test_the_shipped_base_is_small_and_loads_in_transformers():
    assert 1e6 < (BASE / "model.safetensors").stat().st_size < 3e6
    ours, theirs = load_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ids = torch.tensor(AutoTokenizer.from_pretrained(BASE)("<bos> Q1 7 + 3 * 5 go")["input_ids"])
    hidden = ours(ids, torch.arange(len(ids)), PackedAttention([len(ids)], torch.device("cpu")))
    torch.testing.assert_close(hidden @ ours.head_weight.T, theirs(ids[None]).logits[0], atol=1e-4, rtol=1e-5)


def test_the_shipped_base_does_what_its_card_says():
    card = (BASE / "README.md").read_text()
    assert "python -m bcr.warmstart" in card
    assert re.search(r"^seed: 0$", card, re.MULTILINE)
    stated = {int(n): float(value) for n, value in re.findall(r"accuracy at N = (\d) \| ([\d.]+)", card)}
    cells = evaluate(prepare_evaluation(compose("evaluate", ["device=cpu", "problems=300", "sizes=[1,3]", "budgets=[]"], EvaluateConfig)))
    for cell in cells:
        assert abs(cell["accuracy"] - stated[cell["n"]]) < 0.08  # 300 of the card's 600 problems: three standard errors and more
    assert abs(stated[1] - stated[3]) < 0.05  # packed problems are no harder for it
