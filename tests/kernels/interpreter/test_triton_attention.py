"""The kernels of the paged cache through Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import TOLERANCE, exact, paged

from bcr_kernels import paged_attention, store_kv
from bcr_kernels._triton import attention_backend

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
DTYPES = (torch.float32, torch.bfloat16)
SEQUENCE = st.tuples(st.integers(0, 60), st.integers(0, 6)).map(lambda pair: (pair[0], min(pair) if pair[0] else pair[1]))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(SEQUENCE, max_size=4), st.sampled_from([(2, 1), (3, 3), (7, 1), (4, 2)]), st.sampled_from((16, 24, 32)),
    st.sampled_from((1, 5, 16, 64)), st.booleans(), st.sampled_from(DTYPES),
)  # fmt: skip
def test_against_float64(sequences, heads, head_dim, block_size, share, dtype) -> None:
    """Empty contexts with and without queries, no sequences at all, shared blocks; queries of one and of several, in one call."""
    contexts, counts = [context for context, _ in sequences], [count for _, count in sequences]
    shape = {"heads": heads[0], "kv_heads": heads[1], "head_dim": head_dim, "block_size": block_size}
    case = paged(contexts, counts, **shape, share=share, dtype=dtype)
    out = paged_attention(*case.arguments(), backend="triton")
    assert out.shape == case.q.shape
    if out.numel():
        assert float((out.double() - exact(case)).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [80, 128, 192, 256])
def test_head_dimensions(head_dim: int, dtype: torch.dtype) -> None:
    case = paged([70, 33], [1, 9], head_dim=head_dim, dtype=dtype)
    assert float((paged_attention(*case.arguments(), backend="triton").double() - exact(case)).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("group", [1, 5, 16, 40, 71])
def test_query_heads_of_one_key_head(group: int) -> None:
    """A group that fills a tile, one that does not, and one that needs two."""
    case = paged([30, 9], [1, 5], heads=group, kv_heads=1, head_dim=16)
    assert float((paged_attention(*case.arguments(), backend="triton").double() - exact(case)).abs().max()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [512, 530])
def test_contexts_of_several_spans(context: int, dtype: torch.dtype) -> None:
    case = paged([context, 0, 40], [1, 1, 1], heads=2, kv_heads=1, head_dim=16, dtype=dtype)
    assert float((paged_attention(*case.arguments(), backend="triton").double() - exact(case)).abs().max()) < TOLERANCE[dtype]


def test_scores_far_apart() -> None:
    case = paged([600, 40], [1, 3], head_dim=16)
    out = paged_attention(*case.arguments(), scale=30.0, backend="triton")
    assert float((out.double() - exact(case, 30.0)).abs().max()) < 1e-4


def test_a_prefill_of_many_tiles() -> None:
    """Sequences that begin anywhere in the tiles of their neighbours: each row is made once."""
    case = paged([150, 3, 70, 2], [130, 2, 70, 0], heads=6, kv_heads=2, head_dim=16)
    assert float((paged_attention(*case.arguments(), backend="triton").double() - exact(case)).abs().max()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_depend_on_its_batch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, with spans of 128: alone, in another order, with a wider table, and with the launch for long queries left out."""
    monkeypatch.setattr(attention_backend, "SPAN", 128)
    contexts, counts = [5, 300, 129, 1, 128, 40], [1, 1, 1, 1, 1, 13]
    case = paged(contexts, counts, head_dim=16, dtype=dtype)
    whole = paged_attention(*case.arguments(), backend="triton")
    assert torch.equal(paged_attention(*case.arguments(), backend="triton"), whole)
    assert float((whole.double() - exact(case)).abs().max()) < TOLERANCE[dtype]
    caches = case.k_cache, case.v_cache
    for rows in ([0], [1], [4, 2], [3, 1, 0], [5], [5, 1]):
        tokens = torch.cat([torch.arange(case.cu_query_lengths[row], case.cu_query_lengths[row + 1]) for row in rows])
        ends = torch.tensor([0] + [counts[row] for row in rows]).cumsum(0).int()
        width = -(-max(contexts[row] for row in rows) // 16)
        for tables in (case.block_tables[rows, :width], case.block_tables[rows]):
            out = paged_attention(case.q[tokens], *caches, tables, case.context_lengths[rows], ends, backend="triton")
            assert torch.equal(out, whole[tokens]), rows
    decode = [case.q[:5], *caches, case.block_tables[:5], case.context_lengths[:5], case.cu_query_lengths[:6]]
    assert torch.equal(paged_attention(*decode, max_query_length=1, backend="triton"), whole[:5])


def test_a_chunked_prompt_is_the_whole_prompt() -> None:
    """Bitwise, where every chunk has several queries: a row's tiles of the context begin at 0 whatever the chunk."""
    case = paged([90], [90], head_dim=16)
    whole = paged_attention(*case.arguments(), backend="triton")
    for start, stop in ((0, 32), (32, 50), (50, 90)):
        lengths = torch.tensor([stop], dtype=torch.int32), torch.tensor([0, stop - start], dtype=torch.int32)
        out = paged_attention(case.q[start:stop], case.k_cache, case.v_cache, case.block_tables, *lengths, backend="triton")
        assert torch.equal(out, whole[start:stop])


def test_queries_may_be_a_view_of_a_projection() -> None:
    case = paged([40, 9], [1, 9], heads=4, kv_heads=2)
    fused = torch.randn(10, 8, 32)
    fused[:, 2:6] = case.q
    expected = paged_attention(*case.arguments(), backend="triton")
    assert torch.equal(paged_attention(fused[:, 2:6], *case.arguments()[1:], backend="triton"), expected)
    assert torch.equal(
        paged_attention(case.q.transpose(0, 1).contiguous().transpose(0, 1), *case.arguments()[1:], backend="triton"), expected
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-1, 39), max_size=10), st.sampled_from(DTYPES), st.sampled_from((1, 3)))
def test_store(slots: list[int], dtype: torch.dtype, kv_heads: int) -> None:
    slots = [slot for index, slot in enumerate(slots) if slot == -1 or slot not in slots[:index]]
    fused = torch.randn(len(slots), 4, kv_heads, 8).to(dtype)
    filled, expected = ([torch.full((8, 5, kv_heads, 8), 7.0, dtype=dtype) for _ in range(2)] for _ in range(2))
    for caches, backend in ((filled, "triton"), (expected, "reference")):
        store_kv(fused[:, 1], fused[:, 3], *caches, torch.tensor(slots, dtype=torch.int64), backend=backend)  # type: ignore[arg-type]
    assert torch.equal(filled[0], expected[0])
    assert torch.equal(filled[1], expected[1])


def test_offsets_beyond_31_bits() -> None:
    """A cache of 2^32 elements, reserved and touched only where it is read: the place of its last block needs 64 bits."""
    blocks, size, head_dim = 2**20, 64, 64
    cache = torch.empty(blocks, size, 1, head_dim, dtype=torch.bfloat16)
    tokens = torch.randn(3, 1, head_dim).to(torch.bfloat16)
    last = (blocks - 1) * size
    store_kv(tokens, tokens, cache, cache, torch.arange(last, last + 3), backend="triton")
    assert torch.equal(cache[-1, :3], tokens)
    table, lengths = torch.tensor([[blocks - 1]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    out = paged_attention(tokens[2:], cache, cache, table, lengths, torch.tensor([0, 1], dtype=torch.int32), backend="triton")
    near = cache[-1:].clone()
    expected = paged_attention(tokens[2:], near, near, table * 0, lengths, torch.tensor([0, 1], dtype=torch.int32), backend="triton")
    assert torch.equal(out, expected)
