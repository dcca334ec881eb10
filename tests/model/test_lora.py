"""Adapters against `peft`: files both ways, logits, gradients; what they cost the optimizer; and what is refused."""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bcr.learner.step import OptimizerConfig
from bcr.model import Decoder, load_pretrained, save_pretrained
from bcr.model.adapter_files import under_peft_names
from bcr.model.attention import PackedAttention
from bcr.model.lora import TARGETS, LoraLinear
from bcr.model.lora_config import LoraConfig, adapt
from bcr.model.weights import FUSED, under_their_names

SOME = ["up_proj", "v_proj", "q_proj"]
FAMILIES = {"qwen3": {}, "qwen2": {"qk_norm": False, "qkv_bias": True}}
IDS = torch.arange(3, 23)


def logits(model: Decoder) -> torch.Tensor:
    return model.logits(model(IDS, torch.arange(len(IDS)), PackedAttention([len(IDS)], IDS.device)))


def adapted(model: Decoder, config: LoraConfig, base: Path | None = None) -> Decoder:
    """With B random as well, so that the adapter does something."""
    adapt(model, config, base and str(base), seed=5)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraLinear):
                layer.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(6))
    return model


@pytest.mark.parametrize(("family", "targets"), [("qwen3", None), ("qwen2", SOME)])
def test_peft_and_transformers_read_what_we_write(family: str, targets: list[str] | None, make_decoder: Callable, tmp_path: Path) -> None:
    """The adapter onto the base in peft, and the merged weights in transformers, are our function."""
    model = make_decoder(**FAMILIES[family])
    save_pretrained(model, tmp_path / "base")
    plain = logits(model).detach()
    adapted(model, LoraConfig(rank=3, alpha=5.0, targets=targets), tmp_path / "base")
    ours = logits(model).detach()
    assert (ours - plain).abs().max() > 0.1
    save_pretrained(model, tmp_path / "run")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(merged(IDS[None]).logits[0], ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(load_pretrained(tmp_path / "run")), ours, atol=1e-4, rtol=1e-4)
    described = peft.PeftConfig.from_pretrained(tmp_path / "run" / "adapter")
    base = AutoModelForCausalLM.from_pretrained(described.base_model_name_or_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    torch.testing.assert_close(theirs(IDS[None]).logits[0], ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "targets"), [("qwen3", list(TARGETS)), ("qwen2", SOME)])
def test_we_read_what_peft_writes_and_have_its_gradients(family: str, targets: list[str], make_decoder: Callable, tmp_path: Path) -> None:
    """As near as `transformers` comes, whose norms and rotations are float32 in any case. What we write of it is again the same adapter."""
    model = make_decoder(**FAMILIES[family]).double()
    save_pretrained(model, tmp_path / "base")
    asked = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64), asked)
    theirs.save_pretrained(tmp_path / "theirs")
    adapt(model, LoraConfig(path=str(tmp_path / "theirs")), None, seed=0)

    found, expected = logits(model), theirs(IDS[None]).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    some_loss(found).backward()
    some_loss(expected).backward()
    named = gradients(model)
    trained = {name.replace(".default", ""): weight.grad for name, weight in theirs.named_parameters() if weight.requires_grad}
    assert named.keys() == trained.keys()
    for name, gradient in trained.items():
        assert (named[name] - gradient).norm() < 1e-4 * gradient.norm(), name

    save_pretrained(model, tmp_path / "again")
    again, before = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again" / "adapter", tmp_path / "theirs"))
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name].double()) for name in before)


@pytest.mark.parametrize("targets", [None, SOME, ["k_proj", "gate_proj"]])
def test_gradients_are_those_of_the_merged_weights(targets: list[str] | None, make_decoder: Callable) -> None:
    """In float64 to 1e-10: autograd through W + scale B A, written out, in a plain decoder. The base gets no gradient."""
    plain = make_decoder(qkv_bias=True).double()
    model = adapted(copy.deepcopy(plain), LoraConfig(rank=3, alpha=7.5, targets=targets))
    leaves = {name: view.clone().requires_grad_() for name, view in under_peft_names(model).items()}
    parts = {name: weight.clone() for name, weight in under_their_names(plain.state_dict(), plain.config).items()}
    for name in leaves:
        matrix, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if kind == "lora_A":
            parts[f"{matrix}.weight"] = parts[f"{matrix}.weight"] + 2.5 * leaves[name.replace("lora_A", "lora_B")] @ leaves[name]
    state = {}
    for name in plain.state_dict():
        ours = name.split(".")[-2]
        theirs = [f"{'' if ours == 'lm_head' else 'model.'}{name.replace(ours, part)}" for part in FUSED.get(ours, (ours,))]
        state[name] = torch.cat([parts[part] for part in theirs])
    hidden = torch.func.functional_call(plain, state, (IDS, torch.arange(len(IDS)), PackedAttention([len(IDS)], IDS.device)))
    expected, found = hidden @ state["lm_head.weight"].T, logits(model)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    some_loss(expected).backward()
    some_loss(found).backward()
    named = gradients(model)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(named[name], leaf.grad, atol=1e-10, rtol=1e-10)
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }


def some_loss(logits: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    return (logits.log_softmax(-1) * weights).sum()


def gradients(model: Decoder) -> dict[str, torch.Tensor]:
    """Under peft's names."""
    twin = copy.deepcopy(model)
    for mine, layer in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(mine, LoraLinear) and isinstance(layer, LoraLinear):
            layer.lora_A.data, layer.lora_B.data = mine.lora_A.grad, mine.lora_B.grad  # type: ignore[assignment]
    return under_peft_names(twin)


def test_starts_as_its_base_and_differently_for_every_seed(make_decoder: Callable) -> None:
    plain = make_decoder()
    before = logits(plain)
    one, other = (adapt(make_decoder(), LoraConfig(rank=16), None, seed) for seed in (0, 1))
    assert torch.equal(logits(one), before)
    assert not torch.equal(one.layers[0].self_attn.o_proj.lora_A, other.layers[0].self_attn.o_proj.lora_A)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_holds_the_adapters_alone_and_the_base_stays(dtype: torch.dtype, make_decoder: Callable) -> None:
    """Bytes of everything the optimizer keeps: 8 for two moments, 4 more for the master of a narrow weight, for each number of A and B."""
    model = adapted(make_decoder().to(dtype), LoraConfig(rank=2, targets=["q_proj", "down_proj"]))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = OptimizerConfig(lr=0.01).build(model)
    with optimizer.collecting():
        logits(model).logsumexp(-1).sum().backward()
    optimizer.step()
    owners = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = [value for owner in owners for value in optimizer.state[owner].values() if value.dim()] + [*optimizer.master_of.values()]
    hidden, inner, query, rank, layers = 64, 96, 64, 2, 2
    numbers = layers * rank * (hidden + query + inner + hidden)
    assert model.adapter is not None
    assert model.adapter.numbers(model.config) == numbers
    assert sum(tensor.nbytes for tensor in kept) == numbers * (8 if dtype == torch.float32 else 12)
    assert sum(weight.numel() for weight in owners) == numbers
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".lora_" in name}


def test_the_reference_of_adapters_holds_no_second_base(make_decoder: Callable) -> None:
    """What `Learner` does for a KL term: only the adapters are copied, and the present ones are back afterwards, whatever happens."""
    from bcr.learner.reference import Reference

    model = adapted(make_decoder(), LoraConfig(rank=2))
    reference, before = Reference(model, model, None), logits(model)
    with torch.no_grad():
        model.layers[1].mlp.down_proj.lora_B.add_(1.0)  # type: ignore[union-attr, operator]
    after = logits(model)
    assert not torch.equal(after, before)
    with contextlib.suppress(KeyError), reference.model() as started:
        assert started is model
        assert torch.equal(logits(started), before)
        raise KeyError
    assert torch.equal(logits(model), after)
    assert reference.copy is None
    assert {id(weight) for weight in reference.adapters} == {id(weight) for weight in model.parameters() if weight.requires_grad}


def test_merging_in_bfloat16_rounds_once(make_decoder: Callable) -> None:
    """Every weight that is written is the nearest to W + scale B A as float64 has it, or one beside it where float32 decides a tie."""
    model = adapted(make_decoder().bfloat16(), LoraConfig(rank=3, targets=["k_proj"]))
    layer = model.layers[1].self_attn.qkv_proj
    assert isinstance(layer, LoraLinear)
    (_, (start, stop), down, up), exact = next(layer.parts()), layer.weight.detach().double().clone()
    exact[start:stop] += 2.0 * up.double() @ down.double()
    found = under_their_names({"layers.1.self_attn.qkv_proj.weight": layer.merged()}, model.config)
    key = found["model.layers.1.self_attn.k_proj.weight"].double()
    assert ((key - exact[start:stop]).abs() <= exact[start:stop].abs() * 2**-8 * 1.01).all()
    assert torch.equal(found["model.layers.1.self_attn.q_proj.weight"], layer.weight[:start])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(rank=0), "model.lora.rank is 0; it must be at least 1"),
        (LoraConfig(alpha=3.0), "model.lora.alpha is 3.0, but no adapter is asked for; give model.lora.rank too"),
        (LoraConfig(rank=2, alpha=-1.0), "model.lora.alpha is -1.0; it must be positive"),
        (LoraConfig(rank=1, targets=["q_proj", "lm_head"]), "it must name some of q_proj, "),
        (LoraConfig(rank=1, targets=[]), "it must name some of q_proj, "),
        (LoraConfig(path="nowhere"), "model.lora.path is 'nowhere'; there is no adapter_config.json"),
        (LoraConfig(path="nowhere", rank=4), "model.lora.rank is 4; the adapter at model.lora.path brings its own"),
    ],
)
def test_bad_settings_are_refused(config: LoraConfig, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config.adapter(None)


def test_adapters_that_do_not_fit_are_refused(make_decoder: Callable, tmp_path: Path) -> None:
    save_pretrained(adapted(make_decoder(), LoraConfig(rank=2, targets=["o_proj"])), tmp_path)
    folder = tmp_path / "adapter"
    start = LoraConfig(path=str(folder))
    with pytest.raises(ValueError, match=r"'base_model.model.model.layers.2.self_attn.o_proj.lora_A.weight' is missing"):
        adapt(make_decoder(num_hidden_layers=3), start, None, 0)
    with pytest.raises(ValueError, match=r"has shape \(2, 64\); the model calls for \(2, 80\)"):
        adapt(make_decoder(num_attention_heads=5, num_key_value_heads=5), start, None, 0)
    mixture = make_decoder(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    with pytest.raises(ValueError, match="of a mixture of experts only q_proj, k_proj, v_proj, o_proj can be adapted"):
        adapt(mixture, LoraConfig(rank=1), None, 0)

    described = json.loads((folder / "adapter_config.json").read_text())
    for change, said in (({"use_dora": True}, "use_dora is True"), ({"peft_type": "IA3"}, "peft_type is 'IA3'")):
        (folder / "adapter_config.json").write_text(json.dumps({**described, **change}))
        with pytest.raises(ValueError, match=said):
            start.adapter(None)
    (folder / "adapter_config.json").write_text(json.dumps(described))
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapts lm_head; supported are"):
        start.adapter(None)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled adapters are refused"):
        start.adapter(None)
