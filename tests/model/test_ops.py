"""One place decides which implementation runs; the choices are right on every machine, and so is what a CPU can run of the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bcr.model import ops
from bcr.model.attention import PackedAttention
from bcr.model.ops import Implementations, choose

ALL = frozenset({"liger", "flash-attn", "torch varlen", "block tables", "triton", "ampere"})
TORCH = Implementations("torch", "torch", "torch", "torch sdpa", "reference")


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "available", "norm", "attention", "head"),
    [
        ("cuda", torch.bfloat16, 128, ALL, "liger", "flash-attn", "triton"),
        ("cuda", torch.bfloat16, 128, ALL - {"flash-attn"}, "liger", "torch varlen", "triton"),
        ("cuda", torch.bfloat16, 128, ALL - {"flash-attn", "torch varlen"}, "liger", "torch sdpa", "triton"),
        ("cuda", torch.bfloat16, 128, ALL - {"ampere"}, "liger", "torch sdpa", "triton"),  # FlashAttention needs sm_80
        ("cuda", torch.bfloat16, 320, ALL, "liger", "torch sdpa", "triton"),
        ("cuda", torch.bfloat16, 60, ALL, "liger", "torch sdpa", "triton"),
        ("cuda", torch.float32, 128, ALL, "liger", "torch sdpa", "reference"),  # FlashAttention takes 16 bits only
        ("cuda", torch.float64, 128, ALL, "torch", "torch sdpa", "reference"),
        ("cuda", torch.bfloat16, 128, frozenset(), "torch", "torch sdpa", "reference"),
        ("cpu", torch.bfloat16, 128, ALL, "torch", "torch sdpa", "reference"),
        ("cpu", torch.float32, 128, ALL, "torch", "torch sdpa", "reference"),
    ],
)
def test_the_choice(device, dtype, head_dim, available, norm, attention, head) -> None:
    chosen = choose(device, dtype, head_dim, available)
    assert chosen == Implementations(norm, norm, norm, attention, head, chosen.decoding)


@pytest.mark.parametrize(
    ("device", "dtype", "available", "decoding"),
    [
        ("cpu", torch.float32, ALL, "in place"),
        ("cuda", torch.bfloat16, ALL, "bcr_kernels"),
        ("cuda", torch.float32, ALL, "bcr_kernels"),
        ("cuda", torch.float64, ALL, "reference"),
        ("cuda", torch.bfloat16, ALL - {"ampere"}, "reference"),
        ("cuda", torch.bfloat16, ALL - {"triton"}, "flash-attn"),
        ("cuda", torch.float32, ALL - {"triton"}, "reference"),
        ("cuda", torch.bfloat16, ALL - {"triton", "flash-attn"}, "torch varlen"),
        ("cuda", torch.bfloat16, ALL - {"triton", "flash-attn", "block tables"}, "reference"),
    ],
)
def test_the_choice_for_the_sampler(device, dtype, available, decoding) -> None:
    assert choose(device, dtype, 128, available).decoding == decoding


def test_on_a_cpu_it_is_torch_and_says_so() -> None:
    chosen = ops.implementations("cpu", torch.float32)
    assert chosen == TORCH
    assert str(chosen) == "norm: torch, swiglu: torch, rope: torch, attention: torch sdpa, head: reference, decoding: in place"


@pytest.mark.parametrize("way", ["flash-attn", "torch varlen"])
def test_varlen_attention_is_given_the_sequences_as_they_lie(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the CUDA function that does what its documentation says, one sequence at a time, gives the padded way's numbers."""
    calls = []

    def causal(query: Tensor, key: Tensor, value: Tensor, q_bounds: Tensor, k_bounds: Tensor, longest_q: int, longest_k: int) -> Tensor:
        assert q_bounds.dtype == torch.int32
        assert torch.equal(q_bounds, k_bounds)
        assert longest_q == longest_k == int(q_bounds.diff().max())
        calls.append(q_bounds.tolist())
        sizes = q_bounds.diff().tolist()
        parts = zip(*(x.split(sizes) for x in (query, key, value)), strict=True)
        alone = [PackedAttention([len(q)], q.device).padded(q, k, v) for q, k, v in parts]
        return torch.cat(alone)

    def flash_attn_varlen_func(*arguments: object, causal_: bool = False, **options: object) -> Tensor:
        assert options == {"causal": True}
        return causal(*arguments)

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False) -> Tensor:
        assert (window_size, enable_gqa) == ((-1, 0), True)
        return causal(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    monkeypatch.setitem(sys.modules, "flash_attn", type("fake", (), {"flash_attn_varlen_func": flash_attn_varlen_func}))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(14, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    expected = PackedAttention([5, 1, 8], query.device)(0, query, key, value)
    monkeypatch.setattr("bcr.model.attention.implementations", lambda *_: Implementations("torch", "torch", "torch", way, "reference"))
    found = PackedAttention([5, 1, 8], query.device)(0, query, key, value)
    assert calls == [[0, 5, 6, 14]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_ligers_swiglu_and_rope_under_the_interpreter() -> None:
    """In a process of its own, for Triton decides at import. (Liger's RMSNorm does not run in the interpreter; tests/gpu has it.)"""
    program = Path(__file__).with_name("liger_interpreted.py")
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    result = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == ["swiglu", "rope", "rope", "agree"]
