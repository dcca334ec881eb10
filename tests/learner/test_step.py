"""The optimizer step: it moves the policy the right way, its gradient does not depend on the packing, and it never spoils the weights."""

import math

import pytest
import torch

from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.packs import Example, make_pack
from bcr.learner.step import OptimizerConfig, optimizer_step, pack_loss
from bcr.model import Decoder, DecoderConfig
from bcr.model.attention import PackedAttention
from bcr.records import Segment
from bcr_kernels import LossRule

VOCABULARY = 13
LOSS = LossConfig()
ADVANTAGES = [[1.0, 1.0], [-1.0, -0.5], [0.5, 0.0], [-0.5, 1.5]]


def small_decoder():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = DecoderConfig(vocab_size=VOCABULARY, head_dim=8, max_position_embeddings=32, **sizes)
    return Decoder(config).init_weights(0, std=0.2)


def rollouts(model, advantages=ADVANTAGES):
    """Completions of 6 tokens in two segments each, with the model's own log-probs: on policy."""
    generator = torch.Generator().manual_seed(3)
    segments = [Segment(0, 0, 4), Segment(1, 4, 6)]
    drawn = [torch.randint(VOCABULARY, (9,), generator=generator).tolist() for _ in advantages]
    examples = [Example(ids[:3], ids[3:], [0.0] * 6, segments, row) for ids, row in zip(drawn, advantages, strict=True)]
    return [Example(e.prompt_ids, e.token_ids, segment_logprobs(model, e), e.segments, e.advantages) for e in examples]


@torch.no_grad()
def segment_logprobs(model, example):
    """Log-probs of the completion's tokens under the model, by the plain definition."""
    ids = torch.tensor([*example.prompt_ids, *example.token_ids])
    hidden = model(ids, torch.arange(len(ids)), PackedAttention([len(ids)], ids.device))
    table = torch.log_softmax(hidden @ model.head_weight.T, dim=-1)
    first = len(example.prompt_ids) - 1
    return [float(table[first + i, token]) for i, token in enumerate(example.token_ids)]


def packs_of(examples, size):
    total = Denominators.of(example.segments for example in examples)
    return [make_pack(examples[start : start + size], LOSS, total) for start in range(0, len(examples), size)]


def step(model, optimizer, packs, lr=1e-3, grad_clip=1e9):
    return optimizer_step(model, optimizer, packs, LOSS.rule(), temperature=1.0, lr=lr, grad_clip=grad_clip)


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_step_lowers_its_loss():
    model = small_decoder()
    packs = packs_of(rollouts(model), 4)
    before = pack_loss(model, packs[0], LOSS.rule(), 1.0)[0].item()
    sums = step(model, OptimizerConfig().build(model), packs)
    after = pack_loss(model, packs[0], LOSS.rule(), 1.0)[0].item()
    assert sums["updated"] == 1
    assert after < before - 1e-3


def test_praised_tokens_become_likelier_and_blamed_ones_less_likely():
    model = small_decoder()
    praised, blamed = examples = rollouts(model, [[1.0, 1.0], [-1.0, -1.0]])
    step(model, OptimizerConfig().build(model), packs_of(examples, 2))
    assert sum(segment_logprobs(model, praised)) > sum(praised.logprobs) + 1e-2
    assert sum(segment_logprobs(model, blamed)) < sum(blamed.logprobs) - 1e-2


def test_it_is_a_step_against_the_gradient():
    """With plain SGD at rate 0.5 the weights move by -0.5 times the gradient of the summed loss."""
    model = small_decoder()
    packs = packs_of(rollouts(model), 2)
    sum(pack_loss(model, pack, LOSS.rule(), 1.0)[0] for pack in packs).backward()
    expected = [parameter.detach() - 0.5 * parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    step(model, torch.optim.SGD(model.parameters(), lr=123.0), packs, lr=0.5)
    for moved, wanted in zip(weights(model), expected, strict=True):
        torch.testing.assert_close(moved, wanted, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_clipped_by_its_global_norm():
    model = small_decoder()
    packs, before = packs_of(rollouts(model), 2), weights(model)
    sums = step(model, torch.optim.SGD(model.parameters(), lr=1.0), packs, lr=1.0, grad_clip=0.01)
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(weights(model), before, strict=True)))
    assert sums["grad_norm"] > 0.1
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_metrics_add_up_over_packs():
    """One pack or four: the same sums; the loss is that of the step, `tokens` are those with an advantage, Δlogprob is rounding alone."""
    model = small_decoder()
    examples = rollouts(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    for size in (4, 1):
        model.load_state_dict(start)
        found.append(step(model, torch.optim.SGD(model.parameters(), lr=1.0), packs_of(examples, size)))
    together, apart = found
    assert together.keys() == apart.keys()
    for name, value in together.items():
        assert apart[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert together["tokens"] == 4 * 6 - 2  # one segment of two tokens has advantage 0
    by_hand = -sum(4 * first + 2 * second for first, second in ADVANTAGES) / 24  # every ratio is 1
    assert together["loss_sum"] == pytest.approx(by_hand, abs=1e-5)
    assert together["max_mismatch_abs"] < 1e-4
    assert together["grad_norm"] > 0


def test_maxima_are_not_added():
    """The sampler's log-probs of the two packs are off by 0.5 and 0.25: the largest deviation is 0.5, the summed one 6 * 0.75."""
    model = small_decoder()
    first, second = rollouts(model, [[1.0, 1.0], [1.0, 1.0]])
    shifted = [
        Example(e.prompt_ids, e.token_ids, [logprob + off for logprob in e.logprobs], e.segments, e.advantages)
        for e, off in ((first, 0.5), (second, 0.25))
    ]
    sums = step(model, OptimizerConfig().build(model), packs_of(shifted, 1))
    assert sums["max_mismatch_abs"] == pytest.approx(0.5, abs=1e-4)
    assert sums["mismatch_abs_sum"] == pytest.approx(4.5, abs=1e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_is(poison):
    model = small_decoder()
    optimizer = OptimizerConfig().build(model)
    examples = rollouts(model)
    step(model, optimizer, packs_of(examples, 2))  # so that there are moments to spoil
    before, moments = weights(model), [state["exp_avg"].clone() for state in optimizer.state.values()]
    bad = Example(examples[0].prompt_ids, examples[0].token_ids, examples[0].logprobs, examples[0].segments, [poison, 1.0])
    sums = step(model, optimizer, packs_of([*examples, bad], 1))
    assert sums["updated"] == 0
    assert not math.isfinite(sums["grad_norm"])
    assert same(weights(model), before)
    assert same([state["exp_avg"] for state in optimizer.state.values()], moments)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert step(model, optimizer, packs_of(examples, 2))["updated"] == 1  # and the next step goes on
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_without_packs_nothing_happens():
    model = small_decoder()
    optimizer = OptimizerConfig(weight_decay=0.5).build(model)
    before = weights(model)
    assert step(model, optimizer, []) == {"grad_norm": 0.0, "updated": 0.0}
    assert same(weights(model), before)
    assert not optimizer.state


def test_no_gradient_is_left_for_the_next_step():
    """Two steps on one model are a step on a copy of the first's outcome."""
    model, copy = small_decoder(), small_decoder()
    packs = packs_of(rollouts(model), 2)
    step(model, torch.optim.SGD(model.parameters(), lr=1.0), packs, lr=0.1)
    copy.load_state_dict(model.state_dict())
    step(model, torch.optim.SGD(model.parameters(), lr=1.0), packs, lr=0.1)
    step(copy, torch.optim.SGD(copy.parameters(), lr=1.0), packs, lr=0.1)
    assert same(weights(model), weights(copy))


def test_the_temperature_reaches_the_log_probs():
    model = small_decoder()
    packs = packs_of(rollouts(model), 4)
    assert pack_loss(model, packs[0], LossRule(), 1.0)[1]["max_mismatch_abs"] < 1e-4
    assert pack_loss(model, packs[0], LossRule(), 2.0)[1]["max_mismatch_abs"] > 1e-2


def test_the_rate_warms_up_and_stays():
    config = OptimizerConfig(lr=0.4, warmup_steps=4)
    assert [config.rate(step) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert OptimizerConfig(lr=0.4).rate(0) == 0.4


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (OptimizerConfig(lr=0), "optimizer.lr is 0"),
        (OptimizerConfig(lr=math.nan), "optimizer.lr is nan"),
        (OptimizerConfig(grad_clip=-1), "optimizer.grad_clip is -1"),
        (OptimizerConfig(pack_tokens=0), "optimizer.pack_tokens is 0"),
        (OptimizerConfig(betas=[0.9]), "optimizer.betas"),
        (OptimizerConfig(betas=[0.9, 1.0]), "optimizer.betas"),
    ],
)
def test_bad_settings_are_refused_by_name(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        config.check()


def test_good_settings_pass():
    OptimizerConfig().check()
