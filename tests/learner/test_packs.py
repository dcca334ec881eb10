"""Packs: every vector stays aligned with the tokens it came from, and packing loses nothing."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.packs import IGNORED, Example, make_pack, pack_examples
from bcr.records import Segment

calm = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

CONFIG = LossConfig()


@st.composite
def examples(draw, max_tokens=10):
    """A rollout with its completion cut into segments anywhere, problems in any order and repeated."""
    prompt = draw(st.lists(st.integers(0, 99), min_size=1, max_size=5))
    tokens = draw(st.lists(st.integers(0, 99), min_size=1, max_size=max_tokens))
    cuts = sorted(draw(st.sets(st.integers(1, len(tokens) - 1)))) if len(tokens) > 1 else []
    spans = zip([0, *cuts], [*cuts, len(tokens)], strict=True)
    segments = [Segment(draw(st.integers(0, 3)), start, stop) for start, stop in spans]
    advantages = [draw(st.sampled_from([-1.5, -0.25, 0.0, 0.5, 2.0])) for _ in segments]
    logprobs = [-draw(st.integers(1, 1000)) / 128 for _ in tokens]
    return Example(prompt, tokens, logprobs, segments, advantages)


def pack_of(rollouts, dtype=torch.float32):
    return make_pack(rollouts, CONFIG, Denominators.of(example.segments for example in rollouts), dtype=dtype)


def test_the_example_of_the_docstring():
    rollouts = [
        Example([1, 2], [7, 8, 9], [-0.5, -1.0, -1.5], [Segment(0, 0, 2), Segment(1, 2, 3)], [0.5, -0.5]),
        Example([1], [7], [-2.0], [Segment(0, 0, 1)], [1.0]),
    ]
    pack = pack_of(rollouts)
    assert pack.input_ids.tolist() == [1, 2, 7, 8, 1]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 0]
    assert pack.targets.tolist() == [IGNORED, 7, 8, 9, 7]
    assert pack.old_logprobs.tolist() == [0.0, -0.5, -1.0, -1.5, -2.0]
    assert pack.segment_ids.tolist() == [-1, 0, 0, 1, 2]
    assert pack.advantages.tolist() == [0.5, -0.5, 1.0]
    assert pack.weights.tolist() == pytest.approx([0, 0.25, 0.25, 0.25, 0.25])
    assert pack.lengths == [4, 1]
    assert pack.cu_seqlens.tolist() == [0, 4, 5]


@calm
@given(st.lists(examples(), min_size=1, max_size=5))
def test_every_place_tells_of_the_token_it_predicts(rollouts):
    pack = pack_of(rollouts)
    place = 0
    for sequence, example in enumerate(rollouts):
        assert pack.cu_seqlens[sequence] == place
        whole = [*example.prompt_ids, *example.token_ids]
        for position in range(len(whole) - 1):
            assert pack.input_ids[place] == whole[position]
            assert pack.position_ids[place] == position
            sampled = position + 1 - len(example.prompt_ids)  # index in the completion of the token that is predicted here
            if sampled < 0:
                assert pack.targets[place] == IGNORED
                assert pack.segment_ids[place] == -1
                assert pack.weights[place] == 0
            else:
                owner = next(k for k, segment in enumerate(example.segments) if segment.start <= sampled < segment.stop)
                assert pack.targets[place] == example.token_ids[sampled]
                assert pack.old_logprobs[place] == example.logprobs[sampled]
                assert pack.advantages[pack.segment_ids[place]] == example.advantages[owner]
                assert pack.weights[place] > 0
            place += 1
    vectors = (pack.input_ids, pack.position_ids, pack.targets, pack.old_logprobs, pack.segment_ids, pack.weights)
    assert {len(vector) for vector in vectors} == {place}
    assert pack.cu_seqlens.tolist()[-1] == place
    assert pack.cu_seqlens.dtype == torch.int32


@calm
@given(st.lists(examples(), min_size=1, max_size=5))
def test_segments_keep_their_tokens_and_never_share_an_id(rollouts):
    pack = pack_of(rollouts)
    lengths = [segment.stop - segment.start for example in rollouts for segment in example.segments]
    assert torch.bincount(pack.segment_ids + 1, minlength=len(lengths) + 1).tolist()[1:] == lengths
    assert pack.advantages.tolist() == [advantage for example in rollouts for advantage in example.advantages]


@calm
@given(st.lists(examples(), max_size=12), st.integers(1, 40))
def test_packing_loses_nothing_and_respects_the_cap(rollouts, cap):
    packs = pack_examples(rollouts, cap)
    assert Counter(map(id, rollouts)) == Counter(id(example) for pack in packs for example in pack)
    for pack in packs:
        assert len(pack) == 1 or sum(example.length for example in pack) <= cap
        assert pack


@calm
@given(st.lists(examples(), min_size=2, max_size=12), st.integers(1, 40))
def test_like_lengths_meet(rollouts, cap):
    lengths = [example.length for pack in pack_examples(rollouts, cap) for example in pack]
    assert lengths == sorted(lengths, reverse=True)


@calm
@given(st.lists(examples(), min_size=1, max_size=12), st.integers(1, 40))
def test_no_pack_is_opened_while_the_next_rollout_still_fits(rollouts, cap):
    packs = pack_examples(rollouts, cap)
    for pack, following in itertools.pairwise(packs):
        assert sum(example.length for example in pack) + following[0].length > cap


@calm
@given(examples())
def test_a_rollout_has_signal_where_an_advantage_is_not_zero(example):
    assert example.has_signal == any(advantage != 0 for advantage in example.advantages)
    assert example.length == len(pack_of([example]).input_ids)


def test_problems_of_different_rollouts_are_different_problems():
    """With problem-mean, problem 2 of the first rollout (3 tokens, in two segments) and problem 2 of the second (1 token) count alike."""
    config = LossConfig(aggregation="problem-mean")
    rollouts = [
        Example([5], [1, 2, 3, 4], [0.0] * 4, [Segment(2, 0, 1), Segment(0, 1, 2), Segment(2, 2, 4)], [1.0, 1.0, 1.0]),
        Example([5], [1], [0.0], [Segment(2, 0, 1)], [1.0]),
    ]
    pack = make_pack(rollouts, config, Denominators.of(example.segments for example in rollouts))
    assert pack.weights.tolist() == pytest.approx([1 / 9, 1 / 3, 1 / 9, 1 / 9, 1 / 3])


@calm
@given(st.lists(examples(), min_size=1, max_size=3), st.sampled_from([torch.float32, torch.float64]))
def test_the_dtype_asked_for(rollouts, dtype):
    pack = pack_of(rollouts, dtype)
    assert pack.old_logprobs.dtype == pack.advantages.dtype == pack.weights.dtype == dtype
    assert pack.input_ids.dtype == pack.targets.dtype == pack.segment_ids.dtype == torch.int64
