"""Rollouts that share their prompt in a pack learn what they would with a copy each: log-probs, losses, metrics and gradients."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from bcr.learner.learner import Learner
from bcr.learner.logprobs import completion_logprobs
from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.off_policy import OffPolicyConfig
from bcr.learner.packs import Example, make_pack, pack_examples
from bcr.learner.step import OptimizerConfig, pack_loss
from bcr.model import Decoder, DecoderConfig, save_pretrained
from bcr.model.lora_config import LoraConfig, adapt
from bcr.records import Request, Segment
from bcr.sampler import Sampler, SamplingParams

CPU = torch.device("cpu")
TEMPERATURE = 0.8
SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL = DecoderConfig(vocab_size=17, head_dim=6, max_position_embeddings=64, **SIZES)
MODEL = Decoder(SMALL).init_weights(0, std=0.4).double()
LOSSES = {
    "clip": LossConfig(),
    "cispo, by problem, importance, KL": LossConfig("cispo", 1.0, 0.28, "problem-mean", importance_cap=2.0, kl_coef=0.1),
    "gspo": LossConfig("gspo", 3e-4, 4e-4, "seq-mean-token-mean"),
}


def example(prompt: Sequence[int], tokens: Sequence[int], draw: Callable[[], float], cut: int = 0) -> Example:
    """In two segments of two problems where `cut` lies inside, with log-probs that look like a sampler's."""
    spans = [span for span in ((0, cut), (cut, len(tokens))) if span[0] < span[1]]
    segments = [Segment(problem, *span) for problem, span in enumerate(spans)]
    rows = [[-1 - 2 * draw() for _ in tokens] for _ in range(3)]
    return Example(prompt, tokens, rows[0], segments, [2 * draw() - 1 for _ in spans], rows[1], rows[2])


@st.composite
def groups(draw: st.DrawFn) -> list[Example]:
    """Rollouts of one to four prompts, of one token and more, in any order; two groups may have the same prompt; some in contexts."""
    ids, chance = st.integers(0, 16), draw(st.randoms(use_true_random=False))
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=7), min_size=1, max_size=4))
    found = []
    for _ in range(draw(st.integers(1, 8))):
        tokens = draw(st.lists(ids, min_size=1, max_size=9))
        cut = draw(st.integers(0, len(tokens) - 1))
        one = example(draw(st.sampled_from(prompts)), tokens, chance.random, cut)
        if cut and draw(st.booleans()):
            one = Example(**vars(one) | {"contexts": [(one.prompt_ids, cut), (draw(st.sampled_from(prompts)), len(tokens) - cut)]})
        found.append(one)
    return found


def without(loss: LossConfig, given: Sequence[Example]) -> list[Example]:
    """With the log-probs that this loss compares with, and no others."""
    taken = {"learner_logprobs": loss.importance_cap is not None, "reference_logprobs": loss.kl_coef > 0}
    return [Example(**vars(one) | {name: None for name, kept in taken.items() if not kept}) for one in given]


def learnt(model: Decoder, loss: LossConfig, packs: Sequence[Sequence[Example]], dtype: torch.dtype, share: bool) -> list[Tensor]:
    """Summed over the packs: the loss, the metrics that are sums, the gradients."""
    total = Denominators.of(one.segments for pack in packs for one in pack)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    sums: dict[str, Tensor] = {}
    model.zero_grad(set_to_none=True)
    for pack in packs:
        value, metrics = pack_loss(model, make_pack(pack, loss, total, dtype=dtype, share_prompts=share), loss.rule(), TEMPERATURE)
        value.backward()
        for name, one in {"loss": value.detach(), **metrics}.items():
            sums[name] = (torch.maximum if name.startswith("max_") else torch.add)(sums.get(name, torch.zeros_like(one)), one)
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad.clone() for weight in weights]
    return [torch.stack([value.double() for value in sums.values()]), *gradients]


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    gaps = [
        float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-3))
        for one, other in zip(found, expected, strict=True)
    ]
    return max(gaps)


@pytest.mark.parametrize("name", LOSSES)
def test_sharing_changes_nothing_of_loss_metrics_and_gradients(name: str) -> None:
    """In one pack; and packed anew, so small that groups are split, against one rollout a pack."""

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
    @given(groups(), st.integers(8, 40))
    def same(given: list[Example], cap: int) -> None:
        drawn = without(LOSSES[name], given)
        expected = learnt(MODEL, LOSSES[name], [[one] for one in drawn], torch.float64, share=False)
        for packs in ([drawn], pack_examples(drawn, cap)):
            assert apart(learnt(MODEL, LOSSES[name], packs, torch.float64, share=True), expected) < 1e-10

    same()


def a_step(vocabulary: int, seed: int = 0) -> list[Example]:
    """Three groups of rollouts of 1 to 40 tokens; two of them of the same prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> float:
        return float(torch.rand((), generator=generator))

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    prompts = [ids(11), ids(1)]
    lengths = [(0, 1), (0, 17), (0, 40), (0, 23), (1, 5), (1, 1), (1, 30), (0, 12), (0, 2)]
    return without(LossConfig(), [example(prompts[which], ids(count), draw, count // 2) for which, count in lengths])


VARIANTS = {
    "plain": {},
    "experts": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model(variant: str, adapters: bool, checkpointing: bool, make_decoder: Callable[..., Decoder]) -> None:
    """In float32."""
    model = make_decoder(**VARIANTS[variant])
    if adapters:
        adapt(model, LoraConfig(rank=2, targets=["q_proj", "o_proj"]), None, seed=1)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) if weight.requires_grad else 0
    given = a_step(97)
    expected = learnt(copy.deepcopy(model).double(), LossConfig(), [given], torch.float64, share=False)
    model.activation_checkpointing = checkpointing
    errors = [apart(learnt(model, LossConfig(), [given], torch.float32, share), expected) for share in (True, False)]
    assert errors[0] < max(1e-5, 1.5 * errors[1])


def test_the_log_probs_are_those_of_transformers(make_decoder: Callable[..., Decoder], tmp_path) -> None:
    model = make_decoder()
    save_pretrained(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    given = a_step(97)
    (found,) = completion_logprobs(model, [given], TEMPERATURE, CPU)
    for one, row in zip(given, found, strict=True):
        ids = torch.tensor([*one.prompt_ids, *one.token_ids])
        table = torch.log_softmax(theirs(ids[None]).logits[0] / TEMPERATURE, -1)
        expected = table[len(one.prompt_ids) - 1 : -1].gather(1, torch.tensor(one.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(row, dtype=torch.float64), expected.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_invariant_mode_they_are_the_samplers_to_the_last_bit(dtype: torch.dtype, make_decoder: Callable[..., Decoder]) -> None:
    """Prompts of one token, of some and of more than a tile of keys; groups whole and split over packs."""
    model = make_decoder(max_position_embeddings=512).to(dtype)
    generator = torch.Generator().manual_seed(4)
    requests = [
        Request(str(count), torch.randint(96, (count,), generator=generator).tolist(), new) for count, new in ((1, 50), (23, 9), (200, 30))
    ]
    rollouts = Sampler(model, row_block=8).generate(requests, SamplingParams(TEMPERATURE, 4, (97,), seed=3))
    model.invariant = True
    given = [
        Example(request.prompt_ids, rollout.token_ids, rollout.logprobs, [Segment(0, 0, len(rollout.token_ids))], [1.0])
        for request, group in zip(requests, rollouts, strict=True)
        for rollout in group
    ]
    for packs in ([given], pack_examples(given, 300), [given[::2], given[1::2]]):
        found = completion_logprobs(model, packs, TEMPERATURE, CPU)
        for pack, rows in zip(packs, found, strict=True):
            assert rows == [one.logprobs for one in pack]


def test_a_learner_takes_the_same_step(make_decoder: Callable[..., Decoder]) -> None:
    """With its own log-probs, a reference and several updates; packs hold more rollouts where the prompt is shared."""
    given, after, sums = a_step(97)[:8], [], []
    loss = LossConfig(importance_cap=2.0, kl_coef=0.1)
    for share in (True, False):
        model = make_decoder()
        learner = Learner(model, OptimizerConfig(lr=1e-3, pack_tokens=64, share_prompts=share), loss, OffPolicyConfig(2), TEMPERATURE, CPU)
        sums.append(learner.learn(given, 0).sums)
        after.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert sums[0] == pytest.approx(sums[1], rel=1e-4, abs=1e-5)
    assert (after[0] - after[1]).abs().mean() < 1e-6  # of steps of 1e-3; Adam magnifies the rounding of what is nearly 0
    assert len(pack_examples(given, 64)) < len(pack_examples(given, 64, share_prompts=False))
