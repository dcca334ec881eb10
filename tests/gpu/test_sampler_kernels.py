"""The sampler's kernels on CUDA: the checks of the interpreter at real sizes, and what only a device can show."""

import pytest
import torch
from kernel_cases import KINDS, head
from paged_cases import TOLERANCE, exact, paged
from sample_cases import chi_square_excess, random_keys

from bcr_kernels import linear_logprob, linear_sample, paged_attention, store_kv

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 37, 256])
def test_equal_hidden_states_give_the_learners_logprobs(rows: int, kind: str, dtype: torch.dtype) -> None:
    """Bitwise: a decode batch against a training pack of 3,000 tokens that holds the same rows."""
    width = 64 if kind != "confident" else 3072
    hidden, weight, targets = (tensor.cuda() for tensor in head(kind, 3000, width, 5003, dtype))
    sampled = linear_sample(hidden[:rows], weight, random_keys(rows).cuda(), temperature=0.8, backend="triton")
    targets[:rows] = sampled.token
    learner = linear_logprob(hidden, weight, targets, temperature=0.8, backend="triton")
    assert torch.equal(sampled.logprob, learner.logprob[:rows])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_sampling_distribution(backend: str) -> None:
    hidden, weight, _ = head("peaked", 2, 64, 300, torch.bfloat16)
    probabilities = torch.softmax(hidden[1].double() @ weight.double().t(), 0)
    rows = hidden[1:].cuda().expand(50_000, 64).contiguous()
    draws = linear_sample(rows, weight.cuda(), random_keys(50_000).cuda(), backend=backend).token  # type: ignore[arg-type]
    assert chi_square_excess(torch.bincount(draws.cpu(), minlength=300), probabilities) < 4


def test_tokens_of_both_backends_agree() -> None:
    """All but near ties, which are fewer than one row in a thousand."""
    hidden, weight, _ = (tensor.cuda() for tensor in head("peaked", 512, 1024, 151_936, torch.bfloat16))
    tokens = [linear_sample(hidden, weight, random_keys(512).cuda(), backend=backend).token for backend in ("triton", "reference")]
    assert int((tokens[0] != tokens[1]).sum()) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 32), (7, 1, 64), (16, 8, 128), (12, 2, 128), (3, 1, 80), (8, 2, 256)])
def test_attention_against_float64(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    case = paged([1300, 1, 0, 40, 513, 0, 90], [1, 1, 1, 40, 1, 0, 33], **shape)
    out = paged_attention(*case.arguments("cuda"), backend="triton")
    assert float((out.double().cpu() - exact(case)).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    contexts = [5, 300, 1029, 1, 512, 2000]
    case = paged(contexts, [1] * 6, head_dim=128, dtype=dtype)
    q, k, v, tables, lengths, _ = case.arguments("cuda")
    whole = paged_attention(*case.arguments("cuda"), max_query_length=1)
    assert torch.equal(paged_attention(*case.arguments("cuda")), whole)
    for row in range(6):
        ends = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        table = tables[row : row + 1, : -(-contexts[row] // 16)]
        assert torch.equal(paged_attention(q[row : row + 1], k, v, table, lengths[row : row + 1], ends), whole[row : row + 1])


def test_a_step_never_waits_and_can_be_captured() -> None:
    """Store, attention and sampling in one CUDA graph; a replay with other lengths and keys reads them from the device."""
    case = paged([40, 9, 0], [1, 1, 1], heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    q, k_cache, v_cache, tables, lengths, ends = case.arguments("cuda")
    weight, keys = torch.randn(1000, 256, device="cuda", dtype=torch.bfloat16), random_keys(3).cuda()
    k, slots = torch.randn(3, 2, 64, device="cuda", dtype=torch.bfloat16), torch.full((3,), -1, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        store_kv(k, k, k_cache, v_cache, slots)
        out = paged_attention(q, k_cache, v_cache, tables, lengths, ends, max_query_length=1)
        sampled = linear_sample(out.flatten(1), weight, keys)
        assert sampled.logprob is not None
        return sampled.token, sampled.logprob

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")  # any wait of the host for the device
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    lengths -= torch.tensor([3, 1, 0], dtype=torch.int32, device="cuda")
    keys += 1
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


def test_store() -> None:
    caches = [torch.zeros(50, 16, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    fused = torch.randn(300, 32, 128, device="cuda", dtype=torch.bfloat16)
    slots = torch.randperm(800, device="cuda")[:300]
    slots[::7] = -1
    store_kv(fused[:, 16:24], fused[:, 24:], *caches, slots)
    kept = slots >= 0
    assert torch.equal(caches[0].flatten(0, 1)[slots[kept]], fused[kept][:, 16:24])
    assert torch.equal(caches[1].flatten(0, 1)[slots[kept]], fused[kept][:, 24:])
    assert int(caches[0].abs().sum(-1).ne(0).any(-1).sum()) == int(kept.sum())
