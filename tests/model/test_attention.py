"""Bucketed, padded attention is plain causal attention on each sequence, forwards and backwards, and little is padded."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bcr.model.attention import MAX_PADDING, PackedAttention, bucket_by_length

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=9)
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)])


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v over what precedes, one sequence, every step written out."""
    length, heads, size = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) / size**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS, HEADS, st.integers(0, 2**20))
def test_equals_plain_attention_with_its_gradients(lengths: list[int], heads: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total, (query_heads, key_heads), size = sum(lengths), heads, 8

    def random(count: int) -> Tensor:
        return torch.randn(total, count, size, generator=generator, dtype=torch.float64).requires_grad_()

    inputs, weight = (random(query_heads), random(key_heads), random(key_heads)), random(query_heads).detach()
    ours = PackedAttention(lengths, CPU)(0, *inputs)
    plain = torch.cat([plain_attention(*parts) for parts in zip(*(x.split(lengths) for x in inputs), strict=True)])
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, plain))
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", [[5], [3, 3, 3], [8, 9, 10], [10, 9, 8], [30, 2, 30, 2], [1, 100, 1]])
def test_one_plan_serves_all_layers_and_both_precisions(lengths: list[int]) -> None:
    attention = PackedAttention(lengths, CPU)
    inputs = [torch.randn(sum(lengths), 4, 8, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(3)]
    first, second = attention(0, *inputs), attention(5, *inputs)
    assert torch.equal(first, second)
    torch.testing.assert_close(attention(0, *(x.float() for x in inputs)).double(), first, rtol=0, atol=1e-5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_buckets_hold_every_row_once_and_pad_little(lengths: list[int]) -> None:
    buckets = bucket_by_length(lengths)
    assert sorted(row for rows, _ in buckets for row in rows) == list(range(len(lengths)))
    for rows, longest in buckets:
        assert longest == max(lengths[row] for row in rows)
        assert longest <= MAX_PADDING * min(lengths[row] for row in rows)
    shortest = sorted(min(lengths[row] for row in rows) for rows, _ in buckets)
    for earlier, later in itertools.pairwise(shortest):
        assert later > MAX_PADDING * earlier  # no two buckets that could have been one
    assert sum(len(rows) * longest for rows, longest in buckets) <= MAX_PADDING * sum(lengths)


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_lengths_below_one_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PackedAttention(lengths, CPU)
