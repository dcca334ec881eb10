"""Packs: every vector stays aligned with the tokens it came from, and packing loses nothing."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.packs import Example, fill, make_pack, pack_examples, places
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


@st.composite
def groups(draw, size=12):
    """Rollouts of few prompts, in any order: some have the same prompt as others, in their group or in another."""
    prompts = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=4))
    drawn = draw(st.lists(examples(), min_size=1, max_size=size))
    return [replace(example, prompt_ids=draw(st.sampled_from(prompts))) for example in drawn]


def pack_of(rollouts, dtype=torch.float32, share_prompts=True):
    return make_pack(rollouts, CONFIG, Denominators.of(example.segments for example in rollouts), dtype=dtype, share_prompts=share_prompts)


def test_the_example_of_the_docstring():
    rollouts = [
        Example([1, 2], [7, 8, 9], [-0.5, -1.0, -1.5], [Segment(0, 0, 2), Segment(1, 2, 3)], [0.5, -0.5]),
        Example([1, 2], [7], [-2.0], [Segment(0, 0, 1)], [1.0]),
        Example([1], [7], [-2.5], [Segment(0, 0, 1)], [2.0]),
    ]
    pack = pack_of(rollouts)
    assert pack.input_ids.tolist() == [1, 2, 7, 8, 1]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 0]
    assert (pack.lengths, pack.parents, pack.counts) == ([2, 2, 1], [-1, 0, -1], [3, 1, 1])
    assert pack.places.tolist() == [1, 2, 3, 1, 4]
    assert pack.targets.tolist() == [7, 8, 9, 7, 7]
    assert pack.old_logprobs.tolist() == [-0.5, -1.0, -1.5, -2.0, -2.5]
    assert pack.segment_ids.tolist() == [0, 0, 1, 2, 3]
    assert pack.advantages.tolist() == [0.5, -0.5, 1.0, 2.0]
    assert pack.weights.tolist() == pytest.approx([0.2] * 5)
    apart = pack_of(rollouts, share_prompts=False)
    assert apart.input_ids.tolist() == [1, 2, 7, 8, 1, 2, 1]
    assert (apart.lengths, apart.parents) == ([4, 2, 1], [-1, -1, -1])
    assert apart.places.tolist() == [1, 2, 3, 5, 6]


@pytest.mark.parametrize("share_prompts", [False, True])
def test_a_context_without_a_completion_is_refused(share_prompts):
    rollout = Example([1, 2], [7], [-1.0], [Segment(0, 0, 1)], [1.0], contexts=[([1, 2], 1), ([1, 2], 0)])
    with pytest.raises(AssertionError, match="context without a completion"):
        pack_of([rollout], share_prompts=share_prompts)


def before(pack, place):
    """The tokens up to and including a place, in its sequence and in the one that this goes on from."""
    starts = [0, *itertools.accumulate(pack.lengths)]
    row = next(row for row in range(len(pack.lengths)) if starts[row] <= place < starts[row + 1])
    parent = pack.parents[row]
    first = [] if parent < 0 else pack.input_ids[starts[parent] : starts[parent + 1]].tolist()
    return first + pack.input_ids[starts[row] : place + 1].tolist()


@calm
@given(groups(size=5), st.booleans())
def test_every_token_is_predicted_after_what_precedes_it(rollouts, share_prompts):
    pack = pack_of(rollouts, share_prompts=share_prompts)
    token = 0
    for example in rollouts:
        for index, target in enumerate(example.token_ids):
            place = int(pack.places[token])
            assert before(pack, place) == [*example.prompt_ids, *example.token_ids[:index]]
            assert pack.position_ids[place] == len(example.prompt_ids) + index - 1
            owner = next(k for k, segment in enumerate(example.segments) if segment.start <= index < segment.stop)
            assert pack.targets[token] == target
            assert pack.old_logprobs[token] == example.logprobs[index]
            assert pack.advantages[pack.segment_ids[token]] == example.advantages[owner]
            assert pack.weights[token] > 0
            token += 1
    vectors = (pack.places, pack.targets, pack.old_logprobs, pack.segment_ids, pack.weights)
    assert {len(vector) for vector in vectors} == {token} == {sum(pack.counts)}
    assert len(pack.input_ids) == len(pack.position_ids) == sum(pack.lengths) == places(rollouts, share_prompts)
    assert min(pack.lengths) >= 1


@calm
@given(groups())
def test_a_prompt_stands_once(rollouts):
    prompts = {tuple(example.prompt_ids) for example in rollouts}
    assert places(rollouts) == sum(map(len, prompts)) + sum(len(example.token_ids) - 1 for example in rollouts)
    assert places(rollouts, share_prompts=False) == sum(example.length for example in rollouts)


@calm
@given(st.lists(examples(), min_size=1, max_size=5))
def test_segments_keep_their_tokens_and_never_share_an_id(rollouts):
    pack = pack_of(rollouts)
    lengths = [segment.stop - segment.start for example in rollouts for segment in example.segments]
    assert torch.bincount(pack.segment_ids, minlength=len(lengths)).tolist() == lengths
    assert pack.advantages.tolist() == [advantage for example in rollouts for advantage in example.advantages]


@calm
@given(st.one_of(groups(), st.just([])), st.integers(1, 40), st.booleans())
def test_packing_loses_nothing_and_respects_the_cap(rollouts, cap, share_prompts):
    packs = pack_examples(rollouts, cap, share_prompts)
    assert Counter(map(id, rollouts)) == Counter(id(example) for pack in packs for example in pack)
    for pack in packs:
        assert pack
        assert len(pack) == 1 or places(pack, share_prompts) <= cap


@calm
@given(groups(), st.integers(1, 40))
def test_rollouts_of_one_prompt_stay_together_where_they_fit(rollouts, cap):
    """Where they do not, they are in no more packs than filling one after the other, longest first, takes."""
    packs = pack_examples(rollouts, cap)
    for prompt in {tuple(example.prompt_ids) for example in rollouts}:
        own = [example for example in rollouts if tuple(example.prompt_ids) == prompt]
        split = sum(any(tuple(example.prompt_ids) == prompt for example in pack) for pack in packs)
        assert split == 1 if places(own) <= cap else split <= len(fill(sorted(own, key=lambda one: -one.length), cap, True))


@calm
@given(st.lists(examples(), min_size=2, max_size=12), st.integers(1, 40))
def test_like_lengths_meet(rollouts, cap):
    lengths = [example.length for pack in pack_examples(rollouts, cap, share_prompts=False) for example in pack]
    assert lengths == sorted(lengths, reverse=True)


@calm
@given(groups(), st.integers(1, 40), st.booleans())
def test_no_pack_is_opened_while_the_next_rollout_still_fits(rollouts, cap, share_prompts):
    ordered = sorted(rollouts, key=lambda example: -example.length)
    for pack, following in itertools.pairwise(fill(ordered, cap, share_prompts)):
        assert places([*pack, following[0]], share_prompts) > cap


@calm
@given(examples())
def test_a_rollout_has_signal_where_an_advantage_is_not_zero(example):
    assert example.has_signal == any(advantage != 0 for advantage in example.advantages)
    assert example.length == len(pack_of([example]).input_ids) == places([example])


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
