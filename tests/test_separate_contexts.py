"""N contexts on one budget: never more than the budget, each problem read alone, learnt from as one rollout, and plain at N = 1."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.assemble import load_model
from bcr.learner.advantages import AdvantageConfig
from bcr.learner.credit import make_example, make_examples
from bcr.learner.logprobs import completion_logprobs
from bcr.learner.losses import AGGREGATIONS, Denominators, LossConfig
from bcr.learner.packs import Example, make_pack, places
from bcr.learner.rewards import RewardConfig
from bcr.records import Bundle, Request, Rollout, Segment, Verdict
from bcr.runtime.config import compose
from bcr.runtime.schema import DialectConfig, ModelConfig, TrainConfig
from bcr.sampler import Sampler, SamplingParams
from bcr.separate_contexts import joined, sample_chains
from bcr.tasks.arithmetic import ArithmeticDialect, ArithmeticProblems, build_tokenizer
from bcr.tasks.bundles import Budget, BundleStream, SeparateContexts
from bcr.tasks.judging import Judged, judge
from bcr.train import prepare, train

DIALECT = ArithmeticDialect(build_tokenizer())
EOS = DIALECT.stop_token_ids[0]


def bundles_of(sizes: list[int], budget: int, count: int = 4) -> list[Bundle]:
    stream = BundleStream(ArithmeticProblems("train", 3), DIALECT, dict.fromkeys(sizes, 1.0), Budget(budget), seed=3)
    return SeparateContexts(stream, DIALECT).take(count)


class Rambler:
    """A sampler whose answers have a length that only (request id, sample) and the cap decide."""

    def __init__(self) -> None:
        self.policy_version = 7

    def generate(self, requests: list[Request], params: SamplingParams) -> list[list[Rollout]]:
        return [[self.answer(request, sample) for sample in range(params.n)] for request in requests]

    def answer(self, request: Request, sample: int) -> Rollout:
        wanted = random.Random(f"{request.id}/{sample}").randint(1, 30)
        length = min(wanted, request.max_new_tokens)
        tokens = [5] * (length - 1) + [EOS if length == wanted else 5]
        return Rollout(request.id, tokens, [-0.5] * length, "stop" if length == wanted else "length", self.policy_version)


PARAMS = SamplingParams(1.0, 3, (EOS,), seed=1)


@given(st.sets(st.integers(1, 5), min_size=1), st.integers(5, 80), st.randoms())
@settings(deadline=None)
def test_a_chain_spends_its_budget_in_turn_and_never_more(sizes: set[int], budget: int, order: random.Random) -> None:
    bundles = bundles_of(sorted(sizes), budget)
    groups = sample_chains(Rambler(), bundles, PARAMS)  # type: ignore[arg-type]
    for bundle, group in zip(bundles, groups, strict=True):
        for chain in group:
            assert chain.contexts is not None
            assert sum(chain.contexts) == len(chain.token_ids) == len(chain.logprobs) <= budget
            assert len(chain.contexts) == len(bundle.problems)
            asked = [length > 0 for length in chain.contexts]
            assert asked == sorted(asked, reverse=True)  # one after the other
            assert all(asked) or len(chain.token_ids) == budget  # left out only for want of tokens
            stops = chain.token_ids.count(EOS)
            assert (chain.finish == "stop") == (stops == len(asked))
            assert stops >= sum(asked) - 1  # only the last one asked can have been cut off
    shuffled = order.sample(range(len(bundles)), len(bundles))
    again = sample_chains(Rambler(), [bundles[k] for k in shuffled], PARAMS)  # type: ignore[arg-type]
    assert again == [groups[k] for k in shuffled]


@pytest.fixture(scope="module")
def base() -> tuple[Sampler, SamplingParams]:
    model, _ = load_model(ModelConfig(path="builtin/arithmetic-base"), "arithmetic", DialectConfig(), torch.device("cpu"))
    return Sampler(model, row_block=8, invariant=False), SamplingParams(1.0, 4, (EOS,), seed=5)


def test_neither_order_nor_company_changes_a_chain(base: tuple[Sampler, SamplingParams]) -> None:
    sampler, params = base
    bundles = bundles_of([1, 3, 4], 70, count=5)
    together = sample_chains(sampler, bundles, params)
    assert sample_chains(sampler, bundles[::-1], params)[::-1] == together
    assert [sample_chains(sampler, [bundle], params)[0] for bundle in bundles] == together
    assert len({tuple(chain.token_ids) for group in together for chain in group}) > 15  # keys differ by sample


def words(text: str) -> list[int]:
    return DIALECT.encode(text.split())


class Exact:
    def grade(self, pairs: list[tuple[str, str | None]]) -> list[Verdict]:
        return [Verdict.UNANSWERED if said is None else Verdict.CORRECT if said == gold else Verdict.WRONG for gold, said in pairs]


def chain_of(bundle: Bundle, *texts: str) -> Rollout:
    parts = [Rollout("r", tokens := words(text), [-0.1] * len(tokens), "stop" if tokens[-1] == EOS else "length", 0) for text in texts]
    return joined(bundle, parts)


def judged_chains(*chains: list[str]) -> list[Judged]:
    (bundle,) = bundles_of([3], 99, count=1)
    gold = [problem.answer for problem in bundle.problems]
    texts = [[text.replace("GOLD", gold[k]) for k, text in enumerate(chain)] for chain in chains]
    return judge([bundle], [[chain_of(bundle, *chain) for chain in texts]], DIALECT, Exact())[0]


def test_every_context_is_read_as_the_answer_to_its_own_problem() -> None:
    """The first one rambles to its end without an answer; the second is right; the third is cut off before its <eos>."""
    (judged,) = judged_chains(["Q1 wait check <eos>", "Q1 so GOLD . <eos>", "Q1 so GOLD ."])
    assert judged.verdicts == (Verdict.UNANSWERED, Verdict.CORRECT, Verdict.UNANSWERED)
    assert judged.tokens_by_problem == [4, 5, 4]
    assert judged.rollout.finish == "length"
    assert [(segment.problem, segment.start, segment.stop) for segment in judged.segments] == [(0, 0, 4), (1, 4, 9), (2, 9, 13)]
    (judged,) = judged_chains(["Q1 so GOLD . <eos>", "Q1 3 Q1 so GOLD . <eos>"])  # nothing was left for the third
    assert judged.verdicts == (Verdict.CORRECT, Verdict.CORRECT, Verdict.UNANSWERED)
    assert judged.tokens_by_problem == [5, 7, 0]
    assert judged.rollout.contexts == [5, 7, 0]


def test_no_later_context_is_answerable_for_an_earlier_problem() -> None:
    """Both leave the first problem unanswered; the second problem alone tells them apart, and its segment alone has the credit for it."""
    group = judged_chains(["Q1 <eos>", "Q1 so GOLD . <eos>", "Q1 <eos>"], ["Q1 <eos>", "Q1 <eos>", "Q1 <eos>"])
    config = AdvantageConfig("problem", normalise_std=False, discount=0.0)
    assert [example.advantages for example in make_examples([group], config, RewardConfig())] == [[0, 0.5, 0], [0, -0.5, 0]]
    whole = AdvantageConfig("rollout", normalise_std=False)
    assert [example.advantages for example in make_examples([group], whole, RewardConfig())] == [
        pytest.approx([s / 6] * 3) for s in (1, -1)
    ]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_tokens_weigh_what_they_would_in_one_context(aggregation: str) -> None:
    """A chain is one rollout to the loss: the same weights, advantages and denominators as one completion with the same segments."""
    group = judged_chains(["Q1 <eos>", "Q1 so GOLD . <eos>", "Q1 wait <eos>"], ["Q1 so 3 . <eos>", "Q1 <eos>"])
    chains = [make_example(judged, [0.5, -1.0, 2.0][: len(judged.segments)]) for judged in group]
    plain = [Example(c.prompt_ids, c.token_ids, c.logprobs, c.segments, c.advantages) for c in chains]
    loss = LossConfig(aggregation=aggregation, horizon=9 if aggregation == "seq-mean-token-sum-norm" else None)
    assert Denominators.of(c.segments for c in chains) == Denominators.of(c.segments for c in plain)
    total = Denominators.of(c.segments for c in chains)
    several, one = make_pack(chains, loss, total), make_pack(plain, loss, total)
    for name in ("targets", "old_logprobs", "segment_ids", "weights"):
        assert getattr(several, name).tolist() == getattr(one, name).tolist()
    assert several.counts == one.counts
    assert several.parents == [-1, 0, -1, 2, -1, 0, 2]  # three prompts: two with two answers each, one with one
    assert sum(several.lengths) == places(chains) == several.input_ids.numel()
    apart = make_pack(chains, loss, total, share_prompts=False)
    assert len(apart.lengths) == 5
    assert sum(apart.lengths) == sum(c.length for c in chains)


def test_the_learner_sees_the_contexts_that_the_sampler_saw(base: tuple[Sampler, SamplingParams]) -> None:
    sampler, params = base
    bundles = bundles_of([1, 3], 60, count=3)
    chains = [(bundle, chain) for bundle, group in zip(bundles, sample_chains(sampler, bundles, params), strict=True) for chain in group]
    examples = [
        make_example(Judged(bundle, chain, (Segment(0, 0, len(chain.token_ids)),), (Verdict.WRONG,), 0), [1.0]) for bundle, chain in chains
    ]
    ((*found,),) = completion_logprobs(sampler.model, [examples], 1.0, torch.device("cpu"))
    for (_, chain), row in zip(chains, found, strict=True):
        assert row == pytest.approx(chain.logprobs, abs=1e-4)


SMALL = ["device=cpu", "threads=1", "bundles.per_step=3", "bundles.group=4", "resume=auto"]


def run(output: Path, *overrides: str) -> dict[str, bytes]:
    train(prepare(compose("train", [*SMALL, f"output={output}", *overrides], TrainConfig)))
    files = [*output.glob("*.jsonl"), *output.glob("checkpoints/latest/model.safetensors")]
    return {file.name: file.read_bytes() for file in files if file.name != "timings.jsonl"}


def test_one_problem_alone_is_the_ordinary_run_to_the_last_bit(tmp_path: Path) -> None:
    options = ["steps=2", "bundles.sizes=[1]", "bundles.budget=50"]
    assert run(tmp_path / "separate", *options, "bundles.contexts=separate") == run(tmp_path / "shared", *options)


def test_a_run_resumes_and_says_what_it_did(tmp_path: Path) -> None:
    options = ["experiment=arithmetic_separate", "bundles.budget=60", "advantage.scope=problem"]
    once = run(tmp_path / "once", *options, "steps=2")
    run(tmp_path / "twice", *options, "steps=1")
    assert run(tmp_path / "twice", *options, "steps=2") == once
    for step in map(json.loads, once["metrics.jsonl"].splitlines()):
        assert step["tokens_per_problem"] <= 20
        assert step["dlogprob_max"] < 1e-3
        assert 0 < step["unanswered"] < 1
    for record in map(json.loads, once["rollouts.jsonl"].splitlines()):
        assert record["segments"][0]["problem"] == 0
        assert sum(segment["tokens"] for segment in record["segments"]) == record["tokens"] <= 60


@pytest.mark.parametrize(("overrides", "sentence"), [
    (["bundles.contexts=own"], "bundles.contexts is 'own'; it must be 'shared' or 'separate'"),
    (["bundles.contexts=separate", "loss.kind=gspo"], "choose clip or cispo"),
])  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        prepare(compose("train", [f"output={tmp_path}", "device=cpu", "threads=1", *overrides], TrainConfig))
