"""`paged_attention` and `store_kv` on the reference backend, against attention written out in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import TOLERANCE, Paged, exact, paged

from bcr_kernels import paged_attention, paged_reference, store_kv

SEQUENCE = st.tuples(st.integers(0, 70), st.integers(0, 6)).map(lambda pair: (pair[0], min(pair) if pair[0] else pair[1]))


@st.composite
def cases(draw: Callable[..., Any], dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16)) -> Paged:
    """Empty contexts with and without queries, no sequences at all, shared first blocks, any ratio of heads, any block size."""
    sequences = draw(st.lists(SEQUENCE, max_size=5))
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    return paged(
        [context for context, _ in sequences],
        [count for _, count in sequences],
        heads=kv_heads * draw(st.sampled_from((1, 2, 3, 7))),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from((16, 24, 32, 80))),
        block_size=draw(st.sampled_from((1, 5, 16, 128))),
        share=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 5)),
    )


@settings(max_examples=60, deadline=None)
@given(cases())
def test_against_float64(case: Paged) -> None:
    out = paged_attention(*case.arguments())
    assert out.shape == case.q.shape
    assert out.dtype == case.q.dtype
    if out.numel():
        assert float((out.double() - exact(case)).abs().max()) < TOLERANCE[case.q.dtype]


@pytest.mark.parametrize("contexts", [[127, 128, 129], [700, 3, 256], [1]])
def test_long_contexts_and_their_spans(contexts: list[int]) -> None:
    for counts in ([1] * len(contexts), [min(context, 9) for context in contexts]):
        case = paged(contexts, counts, dtype=torch.float64)
        assert float((paged_attention(*case.arguments()) - exact(case)).abs().max()) < 1e-12


def test_scores_far_apart() -> None:
    """Scores of +-900: no exponential overflows, and one position takes all of the weight."""
    case = paged([300, 40], [1, 3])
    scale = 30.0
    out = paged_attention(*case.arguments(), scale=scale)
    assert float((out.double() - exact(case, scale)).abs().max()) < 1e-4


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (3, 1, 64), (1, 1, 32), (2, 2, 128), (8, 1, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_rows_do_not_depend_on_their_batch(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Bitwise: any subset and order of the sequences, other widths of the table, other places of the blocks."""
    contexts = [5, 300, 129, 1, 64, 128, 700, 31]
    case = paged(contexts, [1] * 8, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    whole = paged_attention(*case.arguments())
    assert torch.equal(paged_attention(*case.arguments()), whole)
    for rows in ([3], [6], [1, 4], [7, 2, 0], [6, 5, 4, 3, 2, 1, 0]):
        width = -(-max(contexts[row] for row in rows) // 16)
        part = [case.q[rows], case.k_cache, case.v_cache, case.block_tables[rows, :width], case.context_lengths[rows]]
        ends = torch.arange(len(rows) + 1, dtype=torch.int32)
        assert torch.equal(paged_attention(*part, ends), whole[rows]), rows
    blocks = case.k_cache.shape[0]
    moved = torch.randperm(blocks, generator=torch.Generator().manual_seed(3))
    caches = [torch.empty_like(cache).index_copy_(0, moved, cache) for cache in (case.k_cache, case.v_cache)]
    tables = torch.where(case.block_tables < blocks, moved[case.block_tables.clamp(max=blocks - 1).long()], 0).int()
    assert torch.equal(paged_attention(case.q, *caches, tables, case.context_lengths, case.cu_query_lengths), whole)


def test_a_prefill_does_not_see_the_rest_of_its_batch() -> None:
    case = paged([40, 90, 7], [40, 20, 1])
    whole = paged_attention(*case.arguments())
    alone = [case.q[40:60], case.k_cache, case.v_cache, case.block_tables[1:2], case.context_lengths[1:2]]
    assert torch.equal(paged_attention(*alone, torch.tensor([0, 20], dtype=torch.int32)), whole[40:60])


def test_chunks_of_a_prompt_give_the_whole() -> None:
    """A prompt in one pass, and in chunks down to one token."""
    whole = paged([50], [50], dtype=torch.float64)
    expected = paged_attention(*whole.arguments())
    for chunk in (1, 7, 49):
        for start in range(0, 50, chunk):
            stop = min(50, start + chunk)
            lengths = torch.tensor([stop], dtype=torch.int32), torch.tensor([0, stop - start], dtype=torch.int32)
            out = paged_attention(whole.q[start:stop], whole.k_cache, whole.v_cache, whole.block_tables, *lengths)
            assert float((out - expected[start:stop]).abs().max()) < 1e-13


def test_one_block_may_span_a_request() -> None:
    case = paged([90, 17], [1, 17], block_size=128, dtype=torch.float64)
    assert case.block_tables.shape == (2, 1)
    assert float((paged_attention(*case.arguments()) - exact(case)).abs().max()) < 1e-12


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-1, 39), max_size=12), st.sampled_from((torch.float32, torch.bfloat16)))
def test_store(slots: list[int], dtype: torch.dtype) -> None:
    """Every token lands in its slot, -1 nowhere, and nothing else is touched; k and v may be views of a fused projection."""
    slots = [slot for index, slot in enumerate(slots) if slot == -1 or slot not in slots[:index]]
    fused = torch.randn(len(slots), 4, 2, 8).to(dtype)
    k, v = fused[:, 1], fused[:, 3]
    caches = [torch.full((8, 5, 2, 8), 7.0, dtype=dtype) for _ in range(2)]
    store_kv(k, v, *caches, torch.tensor(slots, dtype=torch.int64))
    for cache, tokens in zip(caches, (k, v), strict=True):
        for place, stored in enumerate(cache.flatten(0, 1)):
            assert torch.equal(stored, tokens[slots.index(place)] if place in slots else torch.full((2, 8), 7.0, dtype=dtype))


def test_a_copied_tail_forks_a_context() -> None:
    """Two rollouts of a prompt share its whole blocks and own a copy of the last: storing for one leaves the other's output alone."""
    case = paged([20, 20], [1, 1], share=True)
    before = paged_attention(*case.arguments())
    slot = case.block_tables[0, 1].long() * 16 + 3
    store_kv(torch.randn(1, 2, 32), torch.randn(1, 2, 32), case.k_cache, case.v_cache, slot[None])
    after = paged_attention(*case.arguments())
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


def good() -> dict[str, Any]:
    return vars(paged([20, 3, 0], [2, 1, 1]))


BAD = [
    ("q", torch.randn(4, 128)),
    ("q", torch.randn(4, 4, 32, dtype=torch.float16)),
    ("q", torch.randn(4, 3, 32)),
    ("q", torch.randn(4, 4, 512)),
    ("k_cache", torch.randn(9, 16, 2, 64)),
    ("k_cache", torch.randn(9, 16, 2, 32, dtype=torch.float64)),
    ("k_cache", torch.randn(9, 2, 16, 32).transpose(1, 2)),
    ("k_cache", torch.randn(9, 0, 2, 32)),
    ("v_cache", torch.randn(3, 16, 2, 32)),
    ("v_cache", torch.randn(16, 2, 32)),
    ("block_tables", torch.zeros(3, 2)),
    ("block_tables", torch.zeros(3, 2, dtype=torch.int64)),
    ("block_tables", torch.full((3, 2), -1, dtype=torch.int32)),
    ("block_tables", torch.full((3, 2), 99, dtype=torch.int32)),
    ("block_tables", torch.zeros(3, 2, dtype=torch.int32, device="meta")),
    ("context_lengths", torch.tensor([20, 3], dtype=torch.int32)),
    ("context_lengths", torch.tensor([33, 3, 0], dtype=torch.int32)),
    ("context_lengths", torch.tensor([1, 3, 0], dtype=torch.int32)),
    ("context_lengths", torch.tensor([20, 3, 0])),
    ("cu_query_lengths", torch.tensor([0, 2, 3], dtype=torch.int32)),
    ("cu_query_lengths", torch.tensor([0, 2, 3, 4])),
    ("cu_query_lengths", torch.tensor([0, 3, 2, 4], dtype=torch.int32)),
    ("cu_query_lengths", torch.tensor([0, 2, 3, 5], dtype=torch.int32)),
    ("cu_query_lengths", torch.tensor([1, 2, 3, 4], dtype=torch.int32)),
    ("scale", float("nan")),
    ("scale", "wide"),
    ("max_query_length", 1),
    ("max_query_length", -1),
    ("backend", "cuda"),
]
STORE: dict[str, Any] = {
    "k": torch.randn(3, 2, 8),
    "v": torch.randn(3, 2, 8),
    "k_cache": torch.zeros(4, 5, 2, 8),
    "v_cache": torch.zeros(4, 5, 2, 8),
    "slots": torch.tensor([0, -1, 19]),
}
BAD_STORE = [
    ("k", torch.randn(3, 16)),
    ("k", torch.randn(3, 2, 8, dtype=torch.float16)),
    ("v", torch.randn(2, 2, 8)),
    ("v", torch.randn(3, 2, 8, dtype=torch.bfloat16)),
    ("k_cache", torch.zeros(4, 5, 2, 16)),
    ("k_cache", torch.zeros(5, 4, 2, 8).transpose(0, 1)),
    ("v_cache", torch.zeros(4, 6, 2, 8)),
    ("v_cache", torch.zeros(4, 5, 2, 8, dtype=torch.bfloat16)),
    ("slots", torch.tensor([0, -2, 19])),
    ("slots", torch.tensor([0, -1, 20])),
    ("slots", torch.tensor([0, -1])),
    ("slots", torch.tensor([0, -1, 19], dtype=torch.int32)),
    ("backend", "cuda"),
]


def names(cases: list[tuple[str, Any]]) -> list[str]:
    return [f"{name}-{index}" for index, (name, _) in enumerate(cases)]


@pytest.mark.parametrize(("name", "value"), BAD, ids=names(BAD))
def test_bad_attention_is_refused(name: str, value: Any) -> None:
    paged_attention(**good())
    with pytest.raises(ValueError, match=rf"^{name}: "):
        paged_attention(**(good() | {name: value}))


@pytest.mark.parametrize(("name", "value"), BAD_STORE, ids=names(BAD_STORE))
def test_bad_stores_are_refused(name: str, value: Any) -> None:
    store_kv(**STORE)
    with pytest.raises(ValueError, match=rf"^{name}: "):
        store_kv(**(STORE | {name: value}))


def test_the_span_of_the_reference_covers_these_tests() -> None:
    assert paged_reference.SPAN == 128
