"""Bucketed, padded attention is plain causal attention on each sequence, forwards and backwards, and little is padded."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bcr.model.attention import TILE, PackedAttention
from bcr.model.padding import MAX_PADDING, bucket_by_length

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


@st.composite
def families(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sequences of which some go on from others, in any order that has the parent first."""
    lengths, parents = [draw(st.integers(1, 12))], [-1]
    for row in range(1, draw(st.integers(1, 9))):
        roots = [earlier for earlier in range(row) if parents[earlier] < 0]
        parents.append(draw(st.sampled_from([-1, *roots])))
        lengths.append(draw(st.integers(1, 30)))
    return lengths, parents


def stand_alone(lengths: list[int], parents: list[int], x: Tensor) -> list[Tensor]:
    """For each sequence its tokens with its parent's before them."""
    parts = x.split(lengths)
    return [torch.cat([parts[parent], own]) if parent >= 0 else own for parent, own in zip(parents, parts, strict=True)]


def plain_attention_after_parents(lengths: list[int], parents: list[int], inputs: tuple[Tensor, ...]) -> Tensor:
    rows = zip(*(stand_alone(lengths, parents, x) for x in inputs), strict=True)
    return torch.cat([plain_attention(*row)[-length:] for row, length in zip(rows, lengths, strict=True)])


def random_inputs(total: int, heads: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(total, heads[0], 8), (total, heads[1], 8), (total, heads[1], 8)]
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def agree(ours: Tensor, plain: Tensor, inputs: tuple[Tensor, ...]) -> None:
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad((out * weight).sum(), inputs) for out in (ours, plain))
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-11)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(families(), HEADS, st.integers(0, 2**20))
def test_after_its_parent_a_sequence_is_one_with_it(family: tuple[list[int], list[int]], heads: tuple[int, int], seed: int) -> None:
    lengths, parents = family
    inputs = random_inputs(sum(lengths), heads, seed)
    agree(PackedAttention(lengths, CPU, parents)(0, *inputs), plain_attention_after_parents(lengths, parents, inputs), inputs)


def test_longer_than_a_tile_after_a_parent() -> None:
    lengths, parents = [5, TILE, TILE + 1, 3, 3 * TILE, 2], [-1, 0, 0, -1, 3, 3]
    inputs = random_inputs(sum(lengths), (2, 1), 0)
    agree(PackedAttention(lengths, CPU, parents)(0, *inputs), plain_attention_after_parents(lengths, parents, inputs), inputs)


def varlen(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, key_bounds: Tensor, longest: int, longest_key: int) -> Tensor:
    """What flash-attn's and torch's varlen functions compute: causal masks end at the last query and the last key."""
    assert (longest, longest_key) == (int(bounds.diff().max()), int(key_bounds.diff().max()))
    out = []
    for (start, stop), (first, last) in zip(*(itertools.pairwise(x.tolist()) for x in (bounds, key_bounds)), strict=True):
        missing = query.new_zeros(last - first - (stop - start), *query.shape[1:])
        out.append(plain_attention(torch.cat([missing, query[start:stop]]), key[first:last], value[first:last])[len(missing) :])
    return torch.cat(out)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(families(), st.integers(0, 2**20))
def test_what_the_kernels_are_given_end_to_end(family: tuple[list[int], list[int]], seed: int) -> None:
    lengths, parents = family
    inputs = random_inputs(sum(lengths), (4, 2), seed)
    ours = PackedAttention(lengths, CPU, parents).end_to_end(varlen, *inputs)
    agree(ours, plain_attention_after_parents(lengths, parents, inputs), inputs)


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


def test_only_those_share_a_bucket_that_have_as_much_before_them() -> None:
    assert bucket_by_length([3, 4, 4, 4, 9], [0, 5, 0, 5, 5]) == [([0], 3), ([2], 4), ([1, 3], 4), ([4], 9)]


@pytest.mark.parametrize("lengths", [[], [3, 0], [-1]])
def test_lengths_below_one_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PackedAttention(lengths, CPU)
