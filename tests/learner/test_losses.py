"""The loss under global denominators: any packing gives the same gradient, and that gradient is the one of the papers' formulas.

The oracle `naive_loss` materialises [T, V] log-softmax rows one rollout at a time and knows nothing of packs, segments or kernels.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcr.learner.losses import AGGREGATIONS, Denominators, LossConfig
from bcr.learner.packs import Example, make_pack
from bcr.learner.step import pack_loss
from bcr.model import Decoder, DecoderConfig
from bcr.model.attention import PackedAttention
from bcr.records import Segment
from bcr_kernels import LossRule, linear_policy_loss

VOCABULARY = 17
TEMPERATURE = 0.8
HORIZON = 9
RATIOS = [1.0, 1.24, 0.7, 1.5, 0.9, 1.1, 0.75, 1.35, 1.25, 0.95, 1.0, 1.0]
RULES = {
    "clip": {"kind": "clip"},
    "clip-higher": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.28},
    "cispo": {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.28},
}
KINDS = [(aggregation, rule) for aggregation in AGGREGATIONS for rule in RULES]


def loss_config(aggregation, rule="clip"):
    return LossConfig(**RULES[rule], aggregation=aggregation, horizon=HORIZON if aggregation == "seq-mean-token-sum-norm" else None)


def small_decoder(dtype=torch.float64):
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = DecoderConfig(vocab_size=VOCABULARY, head_dim=6, max_position_embeddings=64, **sizes)
    return Decoder(config).init_weights(0, std=0.4).to(dtype)


MODEL = small_decoder()


@torch.no_grad()
def logprobs_of(prompt, tokens, model=MODEL):
    """The [T, V] table's rows that predict the completion."""
    ids = torch.tensor([*prompt, *tokens])
    hidden = model(ids, torch.arange(len(ids)), PackedAttention([len(ids)], ids.device))
    table = F.log_softmax(hidden @ model.head_weight.T / TEMPERATURE, dim=-1)
    return [float(table[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)]


def make_examples():
    """Rollouts of many lengths, also out of order, with repeated problems, with silent segments, and three without any signal.

    The ratios of the model's probability to the sampler's run through RATIOS, so that every clip bites, on both sides.
    """
    generator = torch.Generator().manual_seed(1)

    def draw(count):
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    shapes = [
        (3, [(0, 4), (1, 2), (2, 3)], [0.7, -1.1, 0.4]),
        (1, [(0, 1)], [-0.9]),
        (5, [(2, 3), (0, 5), (2, 1), (1, 2)], [1.3, -0.2, 0.5, 0.0]),
        (2, [(0, 6), (1, 6)], [0.0, 0.0]),
        (4, [(1, 2), (0, 2)], [-1.0, -1.0]),
        (2, [(0, 3)], [0.0]),
        (3, [(0, 9), (1, 1)], [0.6, 0.6]),
        (6, [(0, 1), (1, 1), (2, 1)], [0.0, 0.0, 0.0]),
    ]
    examples = []
    for prompt_length, spans, advantages in shapes:
        segments, start = [], 0
        for problem, length in spans:
            segments.append(Segment(problem, start, start + length))
            start += length
        prompt, tokens = draw(prompt_length), draw(start)
        old = [logprob - math.log(ratio) for logprob, ratio in zip(logprobs_of(prompt, tokens), RATIOS, strict=False)]
        examples.append(Example(prompt, tokens, old, segments, advantages))
    return examples


EXAMPLES = make_examples()
TOTAL = Denominators.of(example.segments for example in EXAMPLES)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def summed_over_packs(config, packs, model=MODEL, dtype=torch.float64):
    model.zero_grad(set_to_none=True)
    losses = []
    for examples in packs:
        loss, _ = pack_loss(model, make_pack(examples, config, TOTAL, dtype=dtype), config.rule(), TEMPERATURE)
        loss.backward()
        losses.append(loss.item())
    return math.fsum(losses), [parameter.grad.clone() for parameter in model.parameters()]


def distance(left, right):
    """||left - right|| / ||right|| over all parameters together."""
    gap = sum((a - b).double().square().sum() for a, b in zip(left, right, strict=True))
    return float((gap / sum(b.double().square().sum() for b in right)).sqrt())


def naive_token_losses(example, config):
    """-min(rA, clip(r)A), or CISPO's -sg(clip(r)) A log p, for each completion token, from a whole [T, V] table."""
    prompt = len(example.prompt_ids)
    ids = torch.tensor([*example.prompt_ids, *example.token_ids])
    hidden = MODEL(ids, torch.arange(len(ids)), PackedAttention([len(ids)], ids.device))
    table = torch.log_softmax(hidden @ MODEL.head_weight.T / TEMPERATURE, dim=-1)
    losses = []
    for i, token in enumerate(example.token_ids):
        logprob = table[prompt - 1 + i, token]
        advantage = next(a for s, a in zip(example.segments, example.advantages, strict=True) if s.start <= i < s.stop)
        ratio = torch.exp(logprob - example.logprobs[i])
        bounded = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
        if config.kind == "clip":
            losses.append(-torch.minimum(ratio * advantage, bounded * advantage))
        else:
            losses.append(-bounded.detach() * advantage * logprob)
    return losses


def naive_loss(examples, config):
    """Each aggregation by its definition: means of means, over all rollouts of the step."""
    rows = [naive_token_losses(example, config) for example in examples]
    if config.aggregation == "token-mean":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    if config.aggregation == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    if config.aggregation == "seq-mean-token-sum-norm":
        return sum(sum(row) / HORIZON for row in rows) / len(rows)
    by_problem = []
    for example, row in zip(examples, rows, strict=True):
        for problem in {segment.problem for segment in example.segments}:
            own = [row[i] for s in example.segments if s.problem == problem for i in range(s.start, s.stop)]
            by_problem.append(sum(own) / len(own))
    return sum(by_problem) / len(by_problem)


@st.composite
def packings(draw):
    """Any order of the examples, cut into packs anywhere, with any of the examples without signal left out."""
    kept = [example for example in EXAMPLES if example.has_signal or draw(st.booleans())]
    order = draw(st.permutations(kept))
    cuts = sorted(draw(st.sets(st.integers(1, len(order) - 1))))
    return [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(order)], strict=True)]


@pytest.mark.parametrize(("aggregation", "rule"), KINDS)
def test_it_is_the_papers_loss(aggregation, rule):
    config = loss_config(aggregation, rule)
    loss, gradient = summed_over_packs(config, [EXAMPLES])
    expected = naive_loss(EXAMPLES, config)
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    assert distance(gradient, gradients(MODEL, expected)) < 1e-10


@pytest.mark.parametrize(("aggregation", "rule"), KINDS)
def test_any_packing_gives_the_same_gradient(aggregation, rule):
    config = loss_config(aggregation, rule)
    loss, gradient = summed_over_packs(config, [EXAMPLES])

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(packings())
    def same(packs):
        packed_loss, packed_gradient = summed_over_packs(config, packs)
        assert packed_loss == pytest.approx(loss, rel=1e-10)
        assert distance(packed_gradient, gradient) < 1e-10

    same()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_packing_gives_the_same_gradient_in_float32(aggregation):
    config, model = loss_config(aggregation), small_decoder(torch.float32)
    _, gradient = summed_over_packs(config, [EXAMPLES], model, torch.float32)
    live = [example for example in EXAMPLES if example.has_signal]
    _, one_each = summed_over_packs(config, [[example] for example in reversed(live)], model, torch.float32)
    assert distance(one_each, gradient) < 1e-5


def test_the_rules_differ_and_clipping_bites():
    """Otherwise the comparisons above would compare one thing with itself."""
    found = [summed_over_packs(loss_config(aggregation, rule), [EXAMPLES])[1] for aggregation, rule in KINDS]
    apart = [distance(left, right) for i, left in enumerate(found) for right in found[:i]]
    assert min(apart) > 1e-3
    metrics = pack_loss(MODEL, make_pack(EXAMPLES, loss_config("token-mean"), TOTAL, dtype=torch.float64), LossRule(), TEMPERATURE)[1]
    assert metrics["clipped_high"] >= 2
    assert metrics["clipped_low"] >= 2


# Two rollouts by hand. The first answers problem 0 with two tokens and problem 1 with one, then returns to problem 0 for one more;
# the second answers problem 0 with one token.
BY_HAND = [
    Example([1], [0, 1, 0, 1], [0.0] * 4, [Segment(0, 0, 2), Segment(1, 2, 3), Segment(0, 3, 4)], [1.0, -1.0, 2.0]),
    Example([1, 0], [1], [0.0], [Segment(0, 0, 1)], [-3.0]),
]
WEIGHTS_BY_HAND = {
    "token-mean": [1 / 5, 1 / 5, 1 / 5, 1 / 5, 1 / 5],  # 5 tokens
    "seq-mean-token-mean": [1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 2],  # 2 rollouts of 4 and 1 tokens
    "seq-mean-token-sum-norm": [1 / 18, 1 / 18, 1 / 18, 1 / 18, 1 / 18],  # 2 rollouts, horizon 9
    "problem-mean": [1 / 9, 1 / 9, 1 / 3, 1 / 9, 1 / 3],  # 3 (rollout, problem) pairs of 3, 1 and 1 tokens
}
# p = 1/2 everywhere (two words, equal logits), so the ratios are 1, 5/4, 5/4, 4/5 and 7/10.
OLD_BY_HAND = [1 / 2, 2 / 5, 2 / 5, 5 / 8, 5 / 7]
# ratio * advantage, clipped at 0.2: 1 * 1; min(5/4, 6/5) * 1; 5/4 * -1; 4/5 * 2; max(7/10, 4/5) * -3
GAINS_BY_HAND = [1.0, 1.2, -1.25, 1.6, -2.4]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_case_computed_by_hand(aggregation):
    total = Denominators.of(example.segments for example in BY_HAND)
    assert total == Denominators(tokens=5, rollouts=2, problems=3)
    pack = make_pack(BY_HAND, loss_config(aggregation), total, dtype=torch.float64)
    assert pack.weights.tolist() == pytest.approx(WEIGHTS_BY_HAND[aggregation], rel=1e-12)
    output = linear_policy_loss(
        torch.zeros(5, 3, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.float64),
        pack.targets,
        old_logprobs=torch.tensor(OLD_BY_HAND, dtype=torch.float64).log(),
        segment_ids=pack.segment_ids,
        advantages=pack.advantages,
        weights=pack.weights,
        rule=loss_config(aggregation).rule(),
    )
    expected = -math.fsum(weight * gain for weight, gain in zip(WEIGHTS_BY_HAND[aggregation], GAINS_BY_HAND, strict=True))
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)


def test_problem_mean_gives_every_problem_the_same_say_however_long():
    """One problem answered with 1 token, another with 30: the weights of each add up to one half."""
    example = Example([1], [0] * 31, [0.0] * 31, [Segment(0, 0, 1), Segment(1, 1, 31)], [1.0, 1.0])
    pack = make_pack([example], loss_config("problem-mean"), Denominators.of([example.segments]), dtype=torch.float64)
    assert pack.weights[:1].sum().item() == pytest.approx(0.5)
    assert pack.weights[1:].sum().item() == pytest.approx(0.5)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "problem-mean"])
def test_weights_of_a_whole_step_add_up_to_one(aggregation):
    packs = [make_pack(half, loss_config(aggregation), TOTAL, dtype=torch.float64) for half in (EXAMPLES[:3], EXAMPLES[3:])]
    assert sum(float(pack.weights.sum()) for pack in packs) == pytest.approx(1.0)


def test_denominators_skip_completions_without_tokens():
    assert Denominators.of([[], [Segment(1, 0, 3)], [Segment(0, 0, 2), Segment(0, 2, 4)]]) == Denominators(7, 2, 2)
    assert Denominators.of([]) == Denominators(0, 0, 0)


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"aggregation": "mean"}, "loss.aggregation is 'mean'"),
        ({"aggregation": "seq-mean-token-sum-norm"}, "loss.horizon"),
        ({"horizon": 5}, "loss.horizon"),
        ({"aggregation": "seq-mean-token-sum-norm", "horizon": 0}, "loss.horizon is 0"),
        ({"kind": "ppo"}, "loss.kind"),
        ({"clip_low": 1.5}, "loss.clip_low"),
        ({"clip_high": -0.1}, "loss.clip_high"),
    ],
)
def test_bad_settings_are_refused_by_name(settings_, sentence):
    with pytest.raises(ValueError, match=sentence):
        LossConfig(**settings_).check()


def test_good_settings_pass():
    for aggregation, rule in KINDS:
        loss_config(aggregation, rule).check()
