"""Off-policy and reference options against their definitions, written out in float64 with autograd, without any of our loss code."""

import math

import pytest
import torch

from bcr.learner.learner import Learner
from bcr.learner.logprobs import completion_logprobs
from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.off_policy import OffPolicyConfig, together
from bcr.learner.packs import Example, make_pack, pack_examples
from bcr.learner.step import OptimizerConfig, pack_loss
from bcr.model import Decoder
from bcr.model.attention import PackedAttention
from bcr.records import Segment

CPU = torch.device("cpu")
SEGMENTS = [Segment(0, 0, 4), Segment(1, 4, 7)]


def table(model: Decoder, example: Example, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs [completion] of the example's tokens with their gradient, by the plain definition."""
    ids = torch.tensor([*example.prompt_ids, *example.token_ids])
    hidden = model(ids, torch.arange(len(ids)), PackedAttention([len(ids)], CPU))
    logprobs = torch.log_softmax(hidden @ model.head_weight.T / temperature, dim=-1)
    return logprobs[len(example.prompt_ids) - 1 : -1].gather(1, torch.tensor(example.token_ids)[:, None]).squeeze(1)


def examples(
    model: Decoder, shift: float = 0.3, advantages: tuple[tuple[float, float], ...] = ((1.0, 1.0), (-1.0, -0.5), (0.5, 2.0))
) -> list[Example]:
    """Rollouts whose sampler was about `shift` nats away from the model, token by token."""
    generator = torch.Generator().manual_seed(4)
    made = []
    for row in advantages:
        ids = torch.randint(model.config.vocab_size, (10,), generator=generator).tolist()
        example = Example(ids[:3], ids[3:], [0.0] * 7, SEGMENTS, list(row))
        noise = shift * torch.randn(7, generator=generator)
        made.append(Example(ids[:3], ids[3:], (table(model, example).detach() + noise).tolist(), SEGMENTS, list(row)))
    return made


def gradients(model: Decoder, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def ours(model: Decoder, given: list[Example], config: LossConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    pack = make_pack(given, config, Denominators.of(example.segments for example in given), dtype=torch.float64)
    return pack_loss(model, pack, config.rule(), 1.0)


def by_token(values: tuple[float, ...] | list[float]) -> torch.Tensor:
    return torch.tensor([values[0]] * 4 + [values[1]] * 3, dtype=torch.float64)


@pytest.fixture
def model(make_decoder) -> Decoder:
    return make_decoder().double()


@pytest.mark.parametrize("clip", [1e-6, 0.05, 10.0])
def test_gspo_is_its_definition(model: Decoder, clip: float) -> None:
    """arXiv 2507.18071: the rollout's ratio is the geometric mean; min(s A, clip(s) A), mean over the tokens, then over the rollouts."""
    given = examples(model)
    loss, metrics = ours(model, given, LossConfig(kind="gspo", clip_low=min(clip, 1.0), clip_high=clip, aggregation="seq-mean-token-mean"))
    found = gradients(model, loss)
    expected, outside = torch.zeros((), dtype=torch.float64), 0
    for example in given:
        logprobs, old, advantage = (
            table(model, example),
            torch.tensor(example.logprobs, dtype=torch.float64),
            by_token(list(example.advantages)),
        )
        ratio = ((logprobs - old).mean().detach() + logprobs - logprobs.detach()).exp()  # eq. 13 and 14
        clipped = ratio.clamp(1 - min(clip, 1.0), 1 + clip)
        outside += int(((clipped * advantage) < (ratio * advantage)).sum())
        expected = expected - torch.minimum(ratio * advantage, clipped * advantage).mean() / len(given)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    for one, other in zip(found, gradients(model, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert metrics["clipped_high"] + metrics["clipped_low"] == outside


def test_gspo_with_equal_advantages_has_the_gradient_of_the_sequence_ratio(model: Decoder) -> None:
    """Eq. 7, its gradient through the ratio of the whole rollout and not through one token of it."""
    given = examples(model, advantages=((1.0, 1.0), (-1.0, -1.0)))
    found = gradients(model, ours(model, given, LossConfig("gspo", 1.0, 10.0, "seq-mean-token-mean"))[0])
    sums = [
        -example.advantages[0] * (table(model, example) - torch.tensor(example.logprobs, dtype=torch.float64)).mean().exp() / 2
        for example in given
    ]
    for one, other in zip(found, gradients(model, sums[0] + sums[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["clip", "cispo", "gspo"])
def test_importance_weights_and_kl_are_their_definitions(model: Decoder, make_decoder, kind: str) -> None:
    """min(p_learner / p_sampler, C) on the policy term alone; k3 of the reference on every token, weighted like it."""
    reference = make_decoder(seed=7).double()
    config = LossConfig(kind=kind, clip_low=1.0, clip_high=100.0, aggregation="token-mean", importance_cap=1.1, kl_coef=0.3)
    given = []
    for example in examples(model, advantages=((1.0, 0.0), (-1.0, -1.0))):
        own, theirs = (table(source, example).tolist() for source in (model, reference))
        given.append(Example(example.prompt_ids, example.token_ids, example.logprobs, SEGMENTS, example.advantages, own, theirs))
    loss, metrics = ours(model, given, config)
    found = gradients(model, loss)
    expected, kl = torch.zeros((), dtype=torch.float64), 0.0
    for example in given:
        logprobs, old = table(model, example), table(model, example).detach()
        weight = (old - torch.tensor(example.logprobs, dtype=torch.float64)).exp().clamp(max=1.1)
        towards = torch.tensor(example.reference_logprobs, dtype=torch.float64) - logprobs
        k3 = towards.exp() - 1 - towards
        policy = logprobs if kind == "cispo" else (logprobs - old).exp()  # every ratio is 1
        expected = expected + (-by_token(list(example.advantages)) * weight * policy + 0.3 * k3).sum() / 14
        kl += float(k3.detach().sum())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for one, other in zip(found, gradients(model, expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert float(metrics["reference_kl_sum"]) == pytest.approx(kl, rel=1e-5)
    assert metrics["tokens"] == 14


def test_the_forward_only_log_probs_are_the_definition(make_decoder) -> None:
    model = make_decoder()
    given = examples(model)
    groups = pack_examples(given, 24)
    found = completion_logprobs(model, groups, 0.7, CPU)
    for group, rows in zip(groups, found, strict=True):
        for example, row in zip(group, rows, strict=True):
            torch.testing.assert_close(torch.tensor(row), table(model, example, 0.7).detach(), rtol=0, atol=1e-5)


def learner(model: Decoder, loss: LossConfig, updates: int = 1, lr: float = 1e-2) -> Learner:
    return Learner(model, OptimizerConfig(lr=lr, pack_tokens=20), loss, OffPolicyConfig(updates), 1.0, CPU)


def test_several_updates_are_the_shares_one_after_the_other(make_decoder) -> None:
    shared, alone = make_decoder(), make_decoder()
    given = examples(shared, advantages=((1.0, 1.0), (-1.0, 0.5), (0.5, 2.0), (-2.0, -1.0)))
    learned = learner(shared, LossConfig(), updates=2).learn(given, 0)
    twice = learner(alone, LossConfig())
    apart = [twice.learn(part, 0).sums for part in (given[:2], given[2:])]
    assert all(torch.equal(one, other) for one, other in zip(shared.parameters(), alone.parameters(), strict=True))
    assert learned.sums == together(apart, all_mismatch=False)
    assert learned.sums["tokens"] == 28
    assert learned.sums["mismatch_tokens"] == 14  # of the first update, before the policy moved
    assert learned.extras["policy_kl"] > 0


def test_importance_weights_compare_with_the_weights_before_the_first_update(make_decoder) -> None:
    """On the model's own rollouts every weight is 1 in both updates, though the second update starts from other weights."""
    model = make_decoder()
    given = examples(model, shift=0.0, advantages=((1.0, 1.0), (-1.0, -1.0), (1.0, 1.0), (-1.0, -1.0)))
    learned = learner(model, LossConfig(importance_cap=2.0), updates=2).learn(given, 0)
    assert learned.extras["importance_mean"] == pytest.approx(1.0, abs=1e-5)
    assert learned.extras["importance_capped"] == 0.0
    assert learned.sums["max_mismatch_abs"] < 1e-4
    assert learned.sums["mismatch_tokens"] == 28
    assert learned.extras["policy_kl"] > 1e-6  # it did move


def test_kl_pulls_back_to_the_model_that_the_run_started_from(make_decoder) -> None:
    """Advantages of 0 are silent but for the KL term, and that leads back."""
    model = make_decoder()
    pulled = learner(model, LossConfig(kl_coef=1.0), lr=1e-3)
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    given = examples(model, shift=0.0, advantages=((0.0, 0.0), (0.0, 0.0)))
    divergences = []
    for step in range(6):
        learned = pulled.learn(given, step)
        divergences.append(learned.extras["reference_kl"])
        assert (learned.num_live, learned.skipped) == (0, False)

    assert divergences[-1] < 0.8 * divergences[0]
    assert pulled.reference is not None
    with pulled.reference.model() as reference:
        assert not any(weight.requires_grad for weight in reference.parameters())


def test_the_default_adds_nothing_to_the_log(make_decoder) -> None:
    model = make_decoder()
    learned = learner(model, LossConfig()).learn(examples(model), 0)
    assert learned.extras == {}
    assert learned.sums["mismatch_tokens"] == learned.sums["tokens"]
    assert all(math.isfinite(value) for value in learned.sums.values())
