"""Segment helpers: hand-computed cases in the docstring, and properties against plain loops."""

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bcr_kernels as K
from bcr_kernels import segments

SPANS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=0, max_size=8)  # (gap before, length) of each segment


def layout(spans: list[tuple[int, int]], tail: int) -> tuple[list[int], list[int], list[int]]:
    """Boundaries and, by a loop, the ids."""
    starts, stops, ids = [], [], []
    for index, (gap, length) in enumerate(spans):
        ids += [-1] * gap
        starts.append(len(ids))
        ids += [index] * length
        stops.append(len(ids))
    return starts, stops, ids + [-1] * tail


def test_docstring_examples_hold() -> None:
    results = doctest.testmod(segments)
    assert results.attempted > 8
    assert results.failed == 0


@given(spans=SPANS, tail=st.integers(0, 3), order=st.randoms())
@settings(max_examples=80, deadline=None)
def test_ids_and_counts_match_a_loop(spans: list[tuple[int, int]], tail: int, order) -> None:
    starts, stops, ids = layout(spans, tail)
    actual = K.segment_ids_from_boundaries(torch.tensor(starts, dtype=torch.int64), torch.tensor(stops, dtype=torch.int64), len(ids))
    assert actual.tolist() == ids
    assert K.segment_counts(actual, len(spans)).tolist() == [length for _, length in spans]

    # Boundaries may come in any order: only the labels change with it.
    permutation = list(range(len(spans)))
    order.shuffle(permutation)
    shuffled = K.segment_ids_from_boundaries(
        torch.tensor([starts[i] for i in permutation], dtype=torch.int64),
        torch.tensor([stops[i] for i in permutation], dtype=torch.int64),
        len(ids),
    )
    assert shuffled.tolist() == [permutation.index(i) if i >= 0 else -1 for i in ids]


@given(spans=SPANS.filter(lambda spans: any(length for _, length in spans)), tail=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_weights_give_the_means_that_they_name(spans: list[tuple[int, int]], tail: int) -> None:
    _, _, ids = layout(spans, tail)
    segment_ids = torch.tensor(ids)
    sequence_ids = torch.div(torch.arange(len(ids)), 7, rounding_mode="floor")  # sequences of seven tokens
    sequences = int(sequence_ids.max()) + 1
    loss = torch.randn(len(ids), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inside = segment_ids >= 0

    def total(weights: torch.Tensor) -> float:
        return float((weights * loss).sum())

    d = torch.float64
    assert total(K.token_mean_weights(segment_ids, int(inside.sum()), d)) == pytest.approx(float(loss[inside].mean()))
    per_problem = [float(loss[segment_ids == i].mean()) for i in range(len(spans)) if (segment_ids == i).any()]
    assert total(K.problem_mean_weights(segment_ids, len(spans), len(spans), d)) == pytest.approx(sum(per_problem) / len(spans))
    per_sequence = [loss[inside & (sequence_ids == i)] for i in range(sequences)]
    mean_of_means = sum(float(part.mean()) for part in per_sequence if len(part)) / sequences
    weights = K.sequence_mean_token_mean_weights(segment_ids, sequence_ids, sequences, sequences, d)
    assert total(weights) == pytest.approx(mean_of_means)
    weights = K.sequence_mean_token_sum_weights(segment_ids, torch.tensor(sequences), 16, d)
    assert total(weights) == pytest.approx(float(loss[inside].sum()) / (16 * sequences))


def test_packing_does_not_change_weights() -> None:
    """Two rollouts in one pack, or one in each of two, with the denominators of the whole step."""
    one, two = torch.tensor([-1, 0, 0, 1]), torch.tensor([-1, 0, 0, 0, 0])
    packed = torch.tensor([-1, 0, 0, 1, -1, 2, 2, 2, 2])
    apart = torch.cat([K.problem_mean_weights(one, 2, 3), K.problem_mean_weights(two, 1, 3)])
    assert torch.equal(K.problem_mean_weights(packed, 3, 3), apart)
    sequences = K.sequence_ids_from_cu_seqlens(torch.tensor([0, 4, 9]), 9)
    apart = torch.cat(
        [
            K.sequence_mean_token_mean_weights(one, torch.zeros_like(one), 1, 2),
            K.sequence_mean_token_mean_weights(two, torch.zeros_like(two), 1, 2),
        ]
    )
    assert torch.equal(K.sequence_mean_token_mean_weights(packed, sequences, 2, 2), apart)


def test_an_empty_pack() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert K.segment_ids_from_boundaries(nothing, nothing, 0).shape == (0,)
    assert K.segment_ids_from_boundaries(nothing, nothing, 3).tolist() == [-1, -1, -1]
    assert K.segment_counts(nothing, 0).shape == (0,)
    assert K.problem_mean_weights(nothing, 0, 1).shape == (0,)
    assert K.sequence_ids_from_cu_seqlens(torch.tensor([0, 2, 2, 3], dtype=torch.int32), 4).tolist() == [0, 0, 2, 3]


@pytest.mark.parametrize(
    ("starts", "stops", "name"),
    [([0, 1], [2, 3], "starts"), ([-1], [2], "starts"), ([2], [1], "stops"), ([0], [9], "stops"), ([0, 1], [1], "stops")],
)
def test_bad_boundaries_are_refused(starts: list[int], stops: list[int], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}:"):
        K.segment_ids_from_boundaries(torch.tensor(starts), torch.tensor(stops), 4)


def test_ids_beyond_the_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^ids: must be below 2"):
        K.segment_counts(torch.tensor([0, 2]), 2)
