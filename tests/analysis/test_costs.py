"""The cost formulae against what is really there: weights counted, tensors that autograd keeps, the peak memory of a process."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bcr.analysis.costs import Device, Load, activations, kv_bytes, layer_activations, memory, parameters, peak, seconds, slots
from bcr.model import Decoder, DecoderConfig
from bcr.model.attention import PackedAttention
from bcr.records import Request
from bcr.sampler import Sampler, SamplingParams

BASE = DecoderConfig(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)
SHAPES = {
    "qwen3": BASE,
    "qwen2": replace(BASE, qk_norm=False, qkv_bias=True),
    "narrow": replace(BASE, intermediate_size=128, tie_word_embeddings=True),
    "many heads": replace(BASE, num_attention_heads=8, num_key_value_heads=2),
    "no groups": replace(BASE, num_key_value_heads=4),
    "mixture": replace(BASE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=160),
}
COUNTED = SHAPES | {
    "dense first": replace(BASE, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=96, mlp_only_layers=(0,)),
}
LOAD = Load(
    weight_bytes=4,
    checkpointing=False,
    pack_tokens=384,
    prompt=28,
    budget=100,
    rollouts=6,
    in_flight=6,
    cache_bytes=2**30,
)


@pytest.mark.parametrize("shape", COUNTED.values(), ids=COUNTED)
def test_every_weight_is_counted(shape):
    with torch.device("meta"):
        model = Decoder(shape)
    assert parameters(shape) == sum(weight.numel() for weight in model.parameters())


def kept(shape: DecoderConfig, dtype: torch.dtype, checkpointing: bool = False) -> int:
    """Bytes of all distinct tensors that a forward pass over three sequences of 128 tokens keeps for its backward, weights left out."""
    model = Decoder(shape).init_weights(0).to(dtype)
    model.activation_checkpointing = checkpointing
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    ids, places = torch.randint(0, shape.vocab_size, (384,)), torch.arange(128).repeat(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, places, PackedAttention([128] * 3, torch.device("cpu")))
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_layer_keeps_what_the_formula_says(shape, dtype):
    """Two models that differ by two layers: what they keep differs by two layers' activations."""
    measured = (kept(replace(shape, num_hidden_layers=4), dtype) - kept(shape, dtype)) / 2 / 384
    assert measured == pytest.approx(layer_activations(shape, dtype.itemsize, attention_bytes=4), rel=0.03)


def test_the_cache_takes_what_the_formula_says(make_decoder):
    """A sampler's own cache, for as many rollouts as are asked for and for as many as fit."""
    model = make_decoder()
    load = replace(LOAD, prompt=64, budget=64)
    for cache_mb, in_flight in ((64, 6), (1, 4), (64, 3)):
        one = kv_bytes(model.config, load)
        room = cache_mb * 2**20 if cache_mb > 1 else int(5.5 * one)
        sampler = Sampler(model, max_batch=in_flight, cache_mb=room / 2**20)
        sampler.generate([Request(str(k), [1] * 64, 64) for k in range(3)], SamplingParams(n=2, stop_token_ids=(96,)))
        cache = sampler._cache
        planned = replace(load, in_flight=in_flight, cache_bytes=room)
        assert memory(model.config, planned)["KV cache"] == sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
        assert slots(model.config, planned) == cache.blocks - 1
    assert slots(model.config, replace(load, cache_bytes=one)) == 0


PROBE = """
import pathlib, torch
from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.packs import Example, make_pack
from bcr.learner.step import OptimizerConfig, optimizer_step
from bcr.model import Decoder, DecoderConfig
from bcr.records import Segment
torch.set_num_threads(1)
shape, dtype, checkpointing = DecoderConfig(**{shape}), torch.{dtype}, {checkpointing}
def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
def step(model, lengths):
    examples = [Example([1] * 28, [2] * n, [-1.0] * n, [Segment(0, 0, n)], [1.0]) for n in lengths]
    pack = make_pack(examples, LossConfig(), Denominators.of(example.segments for example in examples), share_prompts=False)
    optimizer_step(model, model.optimizer, [pack], LossConfig().rule(), temperature=1.0, lr=1e-6, grad_clip=1.0)
tiny = Decoder(DecoderConfig(**{tiny})).to(dtype)
object.__setattr__(tiny, "optimizer", OptimizerConfig().build(tiny))
step(tiny, [8])  # libraries loaded, thread pools up
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
before = status("VmRSS")
model = Decoder(shape).to(dtype)
model.activation_checkpointing = checkpointing
object.__setattr__(model, "optimizer", OptimizerConfig().build(model))
for _ in range(2):
    step(model, [485] * {rollouts})
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.slow
def test_a_training_step_peaks_where_the_formula_says(checkpointing):
    """A model of 16 million weights in a process of its own, two steps over a pack of 1,024 tokens: its peak memory."""
    shape = replace(BASE, vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, max_position_embeddings=1024)
    fields = {name: getattr(shape, name) for name in shape.__dataclass_fields__ if name != "rope_scaling"}
    tiny = {**fields, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    code = PROBE
    for name, value in (("shape", fields), ("tiny", tiny), ("dtype", "float32"), ("checkpointing", checkpointing), ("rollouts", 2)):
        code = code.replace(f"{{{name}}}", str(value))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    load = replace(LOAD, checkpointing=checkpointing, pack_tokens=1024, prompt=28, budget=485)
    parts = memory(shape, load)
    expected = peak({**parts, "KV cache": 0.0, "logits while sampling": 0.0})
    assert expected == pytest.approx(int(done.stdout), rel=0.25)


def test_parts_follow_from_the_settings():
    plain = memory(BASE, LOAD)
    assert plain["masters"] == plain["sampler copy"] == 0
    assert plain["moments"] == 8 * parameters(BASE)
    narrow = memory(BASE, replace(LOAD, weight_bytes=2))
    assert (narrow["weights"], narrow["masters"]) == (plain["weights"] / 2, 4 * parameters(BASE))
    sharded = memory(BASE, replace(LOAD, weight_bytes=2, devices=4))
    assert sharded["moments"] == narrow["moments"] / 4
    assert sharded["sampler copy"] == narrow["weights"]
    adapted = memory(BASE, replace(LOAD, weight_bytes=2, trained=1000))
    assert [adapted[part] for part in ("masters", "moments", "gradients")] == [4000, 8000, 4000]
    assert adapted["weights"] == narrow["weights"] + 2000
    assert adapted["head"] == narrow["head"] - 4 * BASE.vocab_size * BASE.hidden_size
    deep = replace(BASE, num_hidden_layers=32)
    assert activations(deep, replace(LOAD, checkpointing=True)) < 0.2 * activations(deep, LOAD)


def test_time_falls_with_bandwidth_arithmetic_and_devices():
    slow, fast = (
        Device(tflops=100.0, bandwidth=1.0, launch=2e-6, captured=2e-6),
        Device(tflops=200.0, bandwidth=2.0, launch=1e-6, captured=1e-6),
    )
    load = replace(LOAD, rollouts=64, in_flight=8)
    one, two = seconds(BASE, load, slow), seconds(BASE, load, fast)
    assert one["sampling"] == pytest.approx(2 * two["sampling"])
    assert one["learning"] == pytest.approx(2 * two["learning"])
    spread = seconds(BASE, replace(load, devices=4), slow)
    assert one["learning"] / 4 <= spread["learning"] < one["learning"] / 3.5  # the last pack of a device may be half empty
    assert spread["sampling"] == pytest.approx(one["sampling"] / 4)
