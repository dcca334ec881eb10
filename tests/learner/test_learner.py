"""The learner when memory runs out: the packs are split, the step is the same, and a rollout that fits nowhere is said to be so."""

import pytest
import torch

from bcr.learner import learner as module
from bcr.learner import step as step_module
from bcr.learner.learner import Learner
from bcr.learner.losses import LossConfig
from bcr.learner.off_policy import OffPolicyConfig
from bcr.learner.packs import Example, Pack
from bcr.learner.step import OptimizerConfig
from bcr.model import Decoder
from bcr.records import Segment


def examples(model: Decoder, count: int = 6) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(model.config.vocab_size, (9,), generator=generator).tolist() for _ in range(count)]
    return [Example(row[:3], row[3:], [-2.0] * 6, [Segment(0, 0, 6)], [(-1.0) ** index]) for index, row in enumerate(rows)]


def learner(model: Decoder) -> Learner:
    return Learner(model, OptimizerConfig(lr=1e-2, pack_tokens=48), LossConfig(), OffPolicyConfig(), 1.0, torch.device("cpu"))


def out_of_memory_above(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device on which a pack above so many tokens fails halfway, with gradients half made. Returns the sizes of all packs tried."""
    tried: list[int] = []
    pack_loss = step_module.pack_loss

    def limited(model: Decoder, pack: Pack, *rest: object, **more: object) -> object:
        size = len(pack.input_ids)
        tried.append(size)
        if size > tokens:
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
    assert "out of memory for a pack of 48 tokens; packs have at most 24 from now on" in capsys.readouterr().out
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
