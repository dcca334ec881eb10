"""bfloat16 weights with float32 masters: small updates add up, gradients are summed in float32, and weights never move in memory."""

import math

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.masters import MasterAdamW
from bcr.learner.packs import Example, make_pack
from bcr.learner.step import OptimizerConfig, optimizer_step, pack_loss
from bcr.model import Decoder
from bcr.records import Request, Segment
from bcr.sampler import Sampler, SamplingParams

LOSS = LossConfig()
PROMPTS = [[5, 9, 2], [40, 1, 1, 30], [7, 8], [60, 61, 62, 63, 64]]
PARAMS = SamplingParams(temperature=1.0, n=1, stop_token_ids=(3,), seed=1)


@pytest.fixture
def decoders(make_decoder):
    """decoders(dtype, ...): the same weights, which bfloat16 can hold, in each dtype."""

    def make(*dtypes: torch.dtype, **changes: object) -> list[Decoder]:
        start = make_decoder(**changes).to(torch.bfloat16).state_dict()
        models = [make_decoder(**changes).to(dtype) for dtype in dtypes]
        for model in models:
            model.load_state_dict(start)
        return models

    return make


def packs_for(model: Decoder, size: int = 2):
    """Rollouts sampled from the model, alternately praised and blamed, `size` of them in a pack."""
    requests = [Request(str(number), prompt, 12) for number, prompt in enumerate(PROMPTS)]
    groups = Sampler(model, row_block=8).generate(requests, PARAMS)
    examples = [
        Example(request.prompt_ids, rollout.token_ids, rollout.logprobs, [Segment(0, 0, len(rollout.token_ids))], [(-1.0) ** number])
        for number, (request, (rollout,)) in enumerate(zip(requests, groups, strict=True))
    ]
    total = Denominators.of(example.segments for example in examples)
    return [make_pack(examples[start : start + size], LOSS, total) for start in range(0, len(examples), size)]


def step(model, optimizer, packs, lr=1e-6):
    return optimizer_step(model, optimizer, packs, LOSS.rule(), temperature=1.0, lr=lr, grad_clip=1.0)


def values(optimizer) -> torch.Tensor:
    return parameters_to_vector([weight.detach().double() for group in optimizer.param_groups for weight in group["params"]])


@pytest.mark.slow
def test_a_hundred_small_steps_track_float32_and_a_plain_bfloat16_optimizer_does_not(decoders):
    """With masters the way is float32's but for the noise of bfloat16 gradients; without them hardly a weight moves."""
    exact, mixed, plain = decoders(torch.float32, torch.bfloat16, torch.bfloat16, tie_word_embeddings=True)
    config, packs, ways = OptimizerConfig(lr=1e-6), packs_for(exact, size=4), []
    began = parameters_to_vector(mixed.parameters()).detach().clone()
    without_masters = torch.optim.AdamW(plain.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for model, optimizer in ((exact, config.build(exact)), (mixed, config.build(mixed)), (plain, without_masters)):
        start = values(optimizer)
        for _ in range(100):
            assert step(model, optimizer, packs)["updated"] == 1
        ways.append(values(optimizer) - start)
    way, tracking, stuck = ways
    assert way.abs().max() > 5e-5
    assert (tracking - way).norm() < 0.25 * way.norm()
    assert (stuck - way).norm() > 0.9 * way.norm()
    final = parameters_to_vector(exact.parameters()).to(torch.bfloat16)
    seen = final != began  # where float32's way is long enough to be seen in bfloat16
    assert seen.float().mean() > 0.03
    assert (parameters_to_vector(mixed.parameters()) == final)[seen].float().mean() > 0.75
    assert (parameters_to_vector(plain.parameters()) == final)[seen].float().mean() < 0.1


def test_weights_are_the_masters_rounded_where_they_always_were_and_the_sampler_reads_them(decoders):
    (model,) = decoders(torch.bfloat16)
    sampler, optimizer = Sampler(model, row_block=8), OptimizerConfig().build(model)
    packs, places = packs_for(model), [weight.data_ptr() for weight in model.parameters()]
    checksum = float(parameters_to_vector(model.parameters()).detach().double().sum())
    for _ in range(3):
        step(model, optimizer, packs, lr=1e-2)
    sampler.on_weights_changed()
    assert [weight.data_ptr() for weight in sampler.model.parameters()] == places
    for weight, master in optimizer.master_of.items():
        assert (weight.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(weight, master.to(torch.bfloat16))
        state = optimizer.state[master]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
    masters = float(torch.cat([master.to(torch.bfloat16).flatten() for master in optimizer.master_of.values()]).double().sum())
    assert float(parameters_to_vector(sampler.model.parameters()).detach().double().sum()) == masters != checksum
    fresh = packs_for(model)
    deviation = max(pack_loss(model, pack, LOSS.rule(), 1.0)[1]["max_mismatch_abs"].item() for pack in fresh)
    old = max(pack_loss(model, pack, LOSS.rule(), 1.0)[1]["max_mismatch_abs"].item() for pack in packs)
    assert deviation < 0.15 < 0.5 < old  # the sampler's log-probs are those of the new weights


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_packs_are_summed_in_float32(tied, decoders):
    """Sixteen packs: the master's gradient is the exact sum of what each pack gives, which a sum in bfloat16 is not."""
    (model,) = decoders(torch.bfloat16, tie_word_embeddings=tied)
    packs = [pack for pack in packs_for(model, size=1) for _ in range(4)]
    optimizer = OptimizerConfig().build(model)
    exact, rounded = {}, {}
    for pack in packs:
        pack_loss(model, pack, LOSS.rule(), 1.0)[0].backward()
        for name, weight in model.named_parameters():
            exact[name] = exact.get(name, 0) + weight.grad.double()
            rounded[name] = rounded.get(name, 0) + weight.grad
        model.zero_grad()
    with optimizer.collecting():
        for pack in packs:
            pack_loss(model, pack, LOSS.rule(), 1.0, optimizer.accumulator(model.head_weight))[0].backward()
    worse = []
    for name, weight in model.named_parameters():
        assert weight.grad is None
        gradient, wanted = optimizer.master_of[weight].grad, exact[name]
        assert gradient.dtype == torch.float32
        of_head = weight is model.head_weight  # its gradient is not even rounded once for each pack
        assert float((gradient - wanted).norm() / wanted.norm()) < (5e-3 if of_head else 1e-6), name
        worse.append(float((rounded[name] - wanted).norm() / wanted.norm()))
    assert sum(worse) / len(worse) > 1e-3


def test_a_token_seen_a_thousand_times_gets_its_whole_gradient(decoders):
    (model,) = decoders(torch.bfloat16)
    ids = torch.tensor([7] * 1000 + [9])
    upstream = torch.rand(1001, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    model.embed_tokens(ids).backward(upstream)
    gradient = model.embed_tokens.weight.grad
    torch.testing.assert_close(gradient[7].float(), upstream[:1000].float().sum(0), rtol=2**-8, atol=0)
    assert torch.equal(gradient[9], upstream[1000])
    assert not gradient[[0, 8, 10, 96]].any()


def test_float32_weights_are_their_own_masters_and_take_the_plain_step(decoders):
    ours, theirs = decoders(torch.float32, torch.float32)
    optimizer, plain = OptimizerConfig(weight_decay=0.1).build(ours), torch.optim.AdamW(theirs.parameters(), weight_decay=0.1, fused=True)
    plain.param_groups[0]["betas"] = (0.9, 0.95)
    assert not optimizer.master_of
    packs = packs_for(ours)
    for _ in range(3):
        step(ours, optimizer, packs, lr=1e-3)
        step(theirs, plain, packs, lr=1e-3)
    assert torch.equal(parameters_to_vector(ours.parameters()), parameters_to_vector(theirs.parameters()))


def test_a_restored_state_goes_on_as_if_never_stopped(decoders, tmp_path):
    through, stopped, resumed = decoders(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    packs = packs_for(through)
    optimizers = [OptimizerConfig().build(model) for model in (through, stopped)]
    for _ in range(3):
        for model, optimizer in zip((through, stopped), optimizers, strict=True):
            step(model, optimizer, packs, lr=1e-4)
    torch.save(optimizers[1].state_dict(), tmp_path / "state.pt")
    again = OptimizerConfig().build(resumed)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(parameters_to_vector(resumed.parameters()), parameters_to_vector(stopped.parameters()))
    for _ in range(3):
        step(through, optimizers[0], packs, lr=1e-4)
        step(resumed, again, packs, lr=1e-4)
    assert torch.equal(values(again), values(optimizers[0]))


def test_a_state_of_another_precision_is_refused(decoders):
    narrow, wide = decoders(torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match=r"has 0 float32 masters and the model needs 19 .*model.dtype"):
        OptimizerConfig().build(narrow).load_state_dict(OptimizerConfig().build(wide).state_dict())


def test_a_gradient_that_is_not_finite_leaves_masters_and_weights(decoders):
    (model,) = decoders(torch.bfloat16)
    optimizer, packs = OptimizerConfig().build(model), packs_for(model)
    before = values(optimizer)
    packs[1].advantages[0] = math.nan
    assert step(model, optimizer, packs)["updated"] == 0
    assert torch.equal(values(optimizer), before)
    assert all(master.grad is None for master in optimizer.master_of.values())


def test_outside_a_step_gradients_stay_with_the_weights(decoders):
    (model,) = decoders(torch.bfloat16)
    optimizer, packs = OptimizerConfig().build(model), packs_for(model)
    step(model, optimizer, packs)
    pack_loss(model, packs[0], LOSS.rule(), 1.0)[0].backward()
    assert isinstance(optimizer, MasterAdamW)
    assert all(weight.grad is not None and optimizer.master_of[weight].grad is None for weight in model.parameters())
