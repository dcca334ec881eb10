"""The decoder on CUDA: Liger and varlen attention agree with torch, and training in bfloat16 keeps sampler and learner together."""

import pytest
import torch

from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.packs import Example, make_pack
from bcr.learner.step import OptimizerConfig, optimizer_step
from bcr.model import ops
from bcr.model.attention import PackedAttention, flash_attention, varlen_attention
from bcr.model.readers import Readers
from bcr.model.rotary import Rotary
from bcr.records import Request, Segment
from bcr.sampler import Sampler, SamplingParams

LENGTHS = [5, 64, 1, 130, 33]
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def gradients(function, inputs):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    upstream = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def relative_error(found, wanted):
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, wanted, strict=True))


def random(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.fixture
def liger():
    pytest.importorskip("liger_kernel")
    from bcr.model import liger

    return liger


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [128, 896, 4096])
def test_rms_norm(width, dtype, liger):
    inputs = [random(300, width, dtype=dtype), random(width, dtype=dtype, seed=1)]
    wanted = gradients(lambda x, w: ops.unweighted_rms_norm(x, 1e-6) * w, [tensor.double() for tensor in inputs])
    assert relative_error(gradients(lambda x, w: liger.rms_norm(x, w, 1e-6), inputs), wanted) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype, liger):
    inputs = [random(300, 2 * 1000, dtype=dtype)]
    wanted = gradients(lambda x: torch.nn.functional.silu(x[:, :1000]) * x[:, 1000:], [tensor.double() for tensor in inputs])
    assert relative_error(gradients(liger.swiglu, inputs), wanted) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
def test_query_and_key(normed, dtype, monkeypatch):
    rotation = Rotary(64, 1e6, 4096, None)(torch.randint(4096, (300,), device="cuda"))
    norms = [random(64, dtype=dtype, seed=1), random(64, dtype=dtype, seed=2)] if normed else []

    def run(x, *weights):
        return ops.query_and_key(x, 12, tuple(weights) or None, 1e-6, rotation)

    inputs = [random(300, 14, 64, dtype=dtype), *norms]
    found = gradients(run, inputs)
    wanted = gradients(run, [tensor.double() for tensor in inputs])  # float64 is torch's
    assert relative_error(found, wanted) < DTYPES[dtype]


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_varlen_attention(heads):
    attention = PackedAttention(LENGTHS, torch.device("cuda"))
    assert ops.implementations("cuda", torch.bfloat16, 64).attention != "torch sdpa"
    inputs = [random(sum(LENGTHS), count, 64, dtype=torch.bfloat16, seed=count) for count in (heads[0], heads[1], heads[1])]
    wanted = gradients(attention.padded, [tensor.double() for tensor in inputs])
    assert relative_error(gradients(lambda *qkv: attention(0, *qkv), inputs), wanted) < 2e-2


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("way", ["flash-attn", "torch varlen"])
def test_varlen_attention_after_parents(way, heads):
    """Fewer queries than keys: the causal mask must end at the last of both."""
    if way not in ops.available_here():
        pytest.skip(f"{way} is not here")
    attention = PackedAttention(LENGTHS, torch.device("cuda"), [-1, 0, 0, -1, 3])
    inputs = [random(sum(LENGTHS), count, 64, dtype=torch.bfloat16, seed=count) for count in (heads[0], heads[1], heads[1])]
    run = flash_attention if way == "flash-attn" else varlen_attention
    wanted = gradients(attention.padded, [tensor.double() for tensor in inputs])
    assert relative_error(gradients(lambda *qkv: attention.end_to_end(run, *qkv), inputs), wanted) < 2e-2
    apart = PackedAttention([5, 69, 6, 130, 163], torch.device("cuda"))  # each with a copy of its parent before it
    rows = torch.cat([torch.arange(a, b) for a, b in [(0, 5), (0, 69), (0, 5), (69, 70), (70, 200), (70, 233)]]).cuda()
    kept = torch.cat([torch.arange(a, b) for a, b in [(0, 5), (10, 74), (79, 80), (80, 210), (340, 373)]]).cuda()
    copies = gradients(lambda *qkv: apart.padded(*(x[rows] for x in qkv))[kept], [tensor.double() for tensor in inputs])
    assert relative_error(wanted, copies) < 1e-10


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("lengths", [[6, 1], [130, 200]])
def test_float32_after_parents(lengths, heads):
    """With as many key as query heads torch's memory-efficient kernel runs, which wants its mask aligned: for 6 and 1 its slice is not."""
    attention = PackedAttention(lengths, torch.device("cuda"), [-1, 0])
    inputs = [random(sum(lengths), count, 64, dtype=torch.float32, seed=count) for count in (heads[0], heads[1], heads[1])]
    wanted = gradients(attention.padded, [tensor.double() for tensor in inputs])
    assert relative_error(gradients(lambda *qkv: attention(0, *qkv), inputs), wanted) < 1e-4


def test_what_readers_say_is_added_up_in_one_order():
    rows = torch.randint(100, (5000,), device="cuda")
    told = random(5000, 256, dtype=torch.bfloat16)
    first, second = (Readers(rows, 100).added_up(told) for _ in range(2))
    assert torch.equal(first, second)
    exact = torch.zeros(100, 256, dtype=torch.float64, device="cuda").index_add_(0, rows, told.double())
    assert relative_error([first], [exact]) < 5e-3


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_decoder_errs_no_more_than_with_torch_alone(qk_norm, make_decoder, monkeypatch):
    model = make_decoder(hidden_size=128, head_dim=64, qk_norm=qk_norm).cuda()
    ids, positions = torch.arange(sum(LENGTHS), device="cuda") % 97, torch.cat([torch.arange(n) for n in LENGTHS]).cuda()

    def logits(model):
        with torch.no_grad():
            hidden = model(ids, positions, PackedAttention(LENGTHS, torch.device("cuda")))
            return hidden.double() @ model.head_weight.double().T

    fused = logits(model)
    exact = logits(model.double())
    assert (fused - exact).abs().max() < 1e-3
    half = model.bfloat16()
    errors = [(logits(half) - exact).abs().mean()]
    monkeypatch.setattr(ops, "available_here", lambda: frozenset())
    ops.implementations.cache_clear()
    errors.append((logits(half) - exact).abs().mean())
    ops.implementations.cache_clear()
    assert errors[0] < 1.25 * errors[1]


def test_a_bfloat16_step_reaches_the_sampler(make_decoder):
    model = make_decoder().to("cuda", torch.bfloat16)
    sampler, optimizer, loss = Sampler(model, row_block=8), OptimizerConfig().build(model), LossConfig()
    places = [weight.data_ptr() for weight in model.parameters()]
    for _ in range(2):
        requests = [Request(str(number), [5, 9, number], 12) for number in range(8)]
        groups = sampler.generate(requests, SamplingParams(1.0, 1, (3,), 1))
        examples = [
            Example(request.prompt_ids, rollout.token_ids, rollout.logprobs, [Segment(0, 0, len(rollout.token_ids))], [(-1.0) ** number])
            for number, (request, (rollout,)) in enumerate(zip(requests, groups, strict=True))
        ]
        pack = make_pack(examples, loss, Denominators.of(example.segments for example in examples), "cuda")
        sums = optimizer_step(model, optimizer, [pack], loss.rule(), temperature=1.0, lr=1e-2, grad_clip=1.0)
        assert sums["updated"] == 1
        assert sums["max_mismatch_abs"] < 0.3
        sampler.on_weights_changed()
    assert [weight.data_ptr() for weight in sampler.model.parameters()] == places
