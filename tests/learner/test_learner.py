"""The learner when memory runs out: the packs are split, the step is the same, and a rollout that fits nowhere is said to be so."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.learner import learner as module
from bcr.learner import step as step_module
from bcr.learner.learner import Learner
from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.off_policy import OffPolicyConfig
from bcr.learner.packs import Example, Pack, make_pack, pack_examples
from bcr.learner.probe import dummy_pack
from bcr.learner.step import OptimizerConfig
from bcr.model import Decoder, DecoderConfig
from bcr.records import Segment
from tests.conftest import SIZES

DECODER = Decoder(DecoderConfig(**{**SIZES, "max_position_embeddings": 2048}))


def examples(model: Decoder, count: int = 6) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(model.config.vocab_size, (9,), generator=generator).tolist() for _ in range(count)]
    return [Example(row[:3], row[3:], [-2.0] * 6, [Segment(0, 0, 6)], [(-1.0) ** index]) for index, row in enumerate(rows)]


def learner(model: Decoder, share_prompts: bool = True) -> Learner:
    config = OptimizerConfig(lr=1e-2, pack_tokens=48, share_prompts=share_prompts)
    return Learner(model, config, LossConfig(), OffPolicyConfig(), 1.0, torch.device("cpu"))


def tokens_of(pack: Pack) -> int:
    return len(pack.input_ids)


def keys_held(pack: Pack) -> int:
    """Of a layer: a sequence's own, and for each reader those of its parent."""
    before = [pack.lengths[parent] for parent in pack.parents if parent >= 0]
    return sum(pack.lengths) + sum(before)


def out_of_memory_above(most: int, monkeypatch: pytest.MonkeyPatch, size_of: Callable[[Pack], int] = tokens_of) -> list[int]:
    """A device on which a pack of a larger size fails halfway, with gradients half made. Returns the sizes of all packs tried."""
    tried: list[int] = []
    pack_loss = step_module.pack_loss

    def limited(model: Decoder, pack: Pack, *rest: object, **more: object) -> object:
        size = size_of(pack)
        tried.append(size)
        if size > most:
            next(model.parameters()).grad = torch.full_like(next(model.parameters()), 7.0)
            raise torch.OutOfMemoryError("out of memory")
        return pack_loss(model, pack, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(step_module, "pack_loss", limited)
    return tried


def test_out_of_memory_splits_the_packs_and_the_step_is_the_same(make_decoder, monkeypatch, capsys) -> None:
    roomy, tight = make_decoder(), make_decoder()
    expected = learner(roomy).learn(examples(roomy), 0)
    tried = out_of_memory_above(17, monkeypatch)
    short_of_memory = learner(tight)
    found = short_of_memory.learn(examples(tight), 0)
    assert tried == [48, 24, *[8] * 6]
    assert found.sums == pytest.approx(expected.sums, rel=1e-5)
    for moved, wanted in zip(tight.parameters(), roomy.parameters(), strict=True):
        torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-4)  # of steps of 1e-2; Adam magnifies rounding
    assert "out of memory with a pack of 48 tokens; packs have at most 24 from now on" in capsys.readouterr().out
    short_of_memory.learn(examples(tight), 1)
    assert tried[8:] == [8] * 6  # it has learnt its lesson
    again = learner(tight)
    again.load_state_dict(short_of_memory.state_dict())
    assert again.pack_tokens == 12


def test_a_rollout_that_fits_nowhere_is_said_to_be_so(make_decoder, monkeypatch) -> None:
    model = make_decoder()
    before = [weight.detach().clone() for weight in model.parameters()]
    out_of_memory_above(7, monkeypatch)
    with pytest.raises(MemoryError, match="no room for one rollout of 8 tokens"):
        learner(model).learn(examples(model), 0)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(weight.grad is None for weight in model.parameters())


def long_prompts(count: int) -> list[Example]:
    return [Example([5] * 20, [7, index, 3], [-2.0] * 3, [Segment(0, 0, 3)], [(-1.0) ** index]) for index in range(count)]


def test_rollouts_of_one_prompt_are_parted_beside_a_longer_single_one(make_decoder, monkeypatch) -> None:
    """Places alone do not say which pack was too large: 42 of one rollout; 32 of six, which hold 152 keys."""
    single = Example([5, 6, 7], [8] * 40, [-2.0] * 40, [Segment(0, 0, 40)], [1.0])
    tried = out_of_memory_above(100, monkeypatch, keys_held)
    assert not learner(make_decoder()).learn([single, *long_prompts(6)], 0).skipped
    assert tried == [42, 152, 42, *[22] * 6]


@pytest.mark.parametrize(("share_prompts", "found"), [(True, 12), (False, 48)])
def test_the_probe_holds_the_keys_of_shared_prompts(share_prompts: bool, found: int, make_decoder, monkeypatch) -> None:
    """Packs may be smaller than one rollout, of which each then has its own."""
    model = make_decoder()
    tried = out_of_memory_above(60, monkeypatch, keys_held)
    probing = learner(model, share_prompts)
    probing.probe(longest=40, group=4)
    assert probing.pack_tokens == found
    assert tried[-1] <= 60
    assert all(weight.grad is None for weight in model.parameters())
    with pytest.raises(MemoryError, match="no room for one rollout of 61 tokens"):
        probing.probe(longest=61, group=4)


@given(st.integers(1, 16), st.integers(1, 1024), st.integers(1100, 5000), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_no_pack_holds_more_than_the_probe(group: int, prompt: int, tokens: int, chance) -> None:
    rows = [[7] * chance.randint(1, 30) for _ in range(6 * group)]
    given = [
        Example([number // group] * prompt, row, [-1.0] * len(row), [Segment(0, 0, len(row))], [1.0]) for number, row in enumerate(rows)
    ]
    probed = dummy_pack(DECODER, LossConfig(), tokens, group)
    assert len(probed.input_ids) == len(probed.targets) == sum(probed.lengths) == tokens
    for part in pack_examples(given, tokens):
        assert keys_held(make_pack(part, LossConfig(), Denominators.of(one.segments for one in part))) <= keys_held(probed) + group**2


def test_the_examples_to_blame_are_found_by_themselves(make_decoder) -> None:
    model = make_decoder()
    given = examples(model)
    for index in (1, 4):
        given[index] = Example(given[index].prompt_ids, given[index].token_ids, [float("nan")] * 6, given[index].segments, [1.0])
    before = [weight.detach().clone() for weight in model.parameters()]
    learned = learner(model).learn(given, 0)
    assert (learned.skipped, learned.culprits, learned.num_live) == (True, [1, 4], 6)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert module.Learned(learned.sums, 6, True, [1, 4], {}) == learned
