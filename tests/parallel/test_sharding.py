"""The sharded learner against the learner of one process: the same sums, gradients and weights for any number of ranks."""

import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bcr.learner import step as step_module
from bcr.learner.learner import Learned, Learner
from bcr.learner.losses import LossConfig
from bcr.learner.off_policy import OffPolicyConfig, Share
from bcr.learner.packs import Example, Pack
from bcr.learner.step import OptimizerConfig
from bcr.model import Decoder, DecoderConfig
from bcr.model.lora import Adapter, adapted_layers, attach, initialise
from bcr.parallel.ranks import Ranks
from bcr.parallel.sharding import whole
from bcr.records import Segment
from tests.parallel.launch import on_ranks

VOCABULARY, CPU = 13, torch.device("cpu")
COUNT, STEPS = 10, 2


@dataclass(frozen=True)
class Case:
    """A learner and what it learns from. `idle`: one rank gets no example, another only such without a signal."""

    dtype: torch.dtype = torch.float64
    model: dict[str, Any] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    updates: int = 1
    recompute: bool = False
    idle: bool = False
    poisoned: tuple[int, ...] = ()  # examples whose advantage is infinite
    live: bool = True
    adapter: Adapter | None = None


TIED = {"tie_word_embeddings": True}
ADAPTER = Adapter(3, 6.0, ("q_proj", "v_proj", "up_proj", "down_proj"))  # of rank 3, which ranks cannot share evenly
CASES = {
    "untied": Case(),
    "tied, recomputed, idle ranks": Case(model=TIED, recompute=True, idle=True, loss=LossConfig(aggregation="problem-mean")),
    "gspo, two updates": Case(loss=LossConfig("gspo", 0.05, 0.05, "seq-mean-token-mean"), updates=2, recompute=True),
    "gspo, tied, idle ranks": Case(model=TIED, loss=LossConfig("gspo", 0.05, 0.05, "seq-mean-token-mean"), idle=True),
    "kl and importance": Case(model=TIED, loss=LossConfig(importance_cap=1.2, kl_coef=0.1), updates=2),
    "kl, idle ranks": Case(loss=LossConfig(kl_coef=0.1), idle=True),
    "experts": Case(model={"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, idle=True),
    "float32": Case(dtype=torch.float32),
    "float32, tied": Case(dtype=torch.float32, model=TIED, recompute=True),
    "adapters": Case(adapter=ADAPTER),
    "adapters, kl, idle ranks": Case(model=TIED, recompute=True, idle=True, loss=LossConfig(kl_coef=0.1), adapter=ADAPTER),
    "adapters, float32": Case(dtype=torch.float32, adapter=ADAPTER, loss=LossConfig(importance_cap=1.2), updates=2),
    "adapters, bfloat16": Case(dtype=torch.bfloat16, adapter=ADAPTER),
    "bfloat16": Case(dtype=torch.bfloat16),
    "nothing live": Case(live=False),
    "poisoned": Case(poisoned=(2, 3, 7)),
}


def decoder(case: Case) -> Decoder:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = DecoderConfig(vocab_size=VOCABULARY, head_dim=8, max_position_embeddings=32, **{**sizes, **case.model})
    model = Decoder(config).init_weights(0, std=0.2).to(case.dtype)
    if case.adapter is not None:
        initialise(attach(model, case.adapter), 1)
        for layer in adapted_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(2))
    model.activation_checkpointing = case.recompute
    return model


def examples(case: Case, step: int) -> list[Example]:
    generator = torch.Generator().manual_seed(3 + step)
    made = []
    for index in range(COUNT):
        length = 5 + index % 3
        ids = torch.randint(VOCABULARY, (3 + length,), generator=generator).tolist()
        logprobs = (-2.0 - torch.rand(length, generator=generator)).tolist()
        advantages = torch.randn(2, generator=generator).tolist() if case.live and not (case.idle and index % 4 == 0) else [0.0, 0.0]
        if index in case.poisoned:
            advantages = [float("inf"), 1.0]
        made.append(Example(ids[:3], ids[3:], logprobs, [Segment(0, 0, 4), Segment(1, 4, length)], advantages))
    return made


def shares_of_rank(case: Case, shares: list[Share], rank: int, size: int) -> list[Share]:
    """Every other example, or with idle ranks: all that are live to the first rank and the rest to the last."""

    def mine(index: int) -> bool:
        return rank == (0 if index % 4 else size - 1) if case.idle else index % size == rank

    found = []
    for share in shares:
        pairs = [(example, index) for example, index in zip(share.examples, share.indices, strict=True) if mine(index)]
        found.append(Share([example for example, _ in pairs], [index for _, index in pairs], share.total))
    return found


@dataclass
class Outcome:
    learned: list[Learned]
    gradients: list[Tensor]  # before each update
    weights: Tensor  # at the end
    copies: list[Tensor]  # the sampler's weights, before the first step and after each
    dtypes: set[torch.dtype]


def flat(tensors: Any) -> Tensor:
    return torch.cat([whole(tensor.detach()).flatten() for tensor in tensors])


def outcome(case: Case, ranks: Ranks, shard_size: int | None = None) -> Outcome:
    model = decoder(case)
    mesh = ranks.mesh(shard_size) if ranks.size > 1 else None
    config = OptimizerConfig(lr=1e-2, pack_tokens=24, grad_clip=1e9)
    learner = Learner(model, config, case.loss, OffPolicyConfig(updates=case.updates), 1.0, CPU, ranks, mesh)
    gradients: list[Tensor] = []
    watched = [weight for group in learner.optimizer.param_groups for weight in group["params"]]
    update = learner.optimizer.step

    def watched_update() -> Any:  # a hook of the optimizer would run once for each of its classes whose `step` torch has wrapped
        gradients.append(flat(weight.grad for weight in watched))
        return update()

    vars(learner.optimizer)["step"] = watched_update
    learner.publish()
    learned, copies = [], [flat(model.parameters()).clone()]
    for step in range(STEPS):
        shares = Share.split(examples(case, step), case.updates)
        learned.append(learner.learn_shares(shares_of_rank(case, shares, ranks.rank, ranks.size), step))
        learner.publish()
        copies.append(flat(model.parameters()).clone())
    assert all(weight.grad is None for weight in [*learner.model.parameters(), *model.parameters()])
    return Outcome(learned, gradients, flat(learner.model.parameters()), copies, {weight.dtype for weight in learner.model.parameters()})


def found_room(ranks: Ranks) -> tuple[int, str]:
    """The pack that is found where the last rank alone is out of memory above 20 tokens; and what is said if a rollout has 30."""
    case, pack_loss = Case(model=TIED, loss=LossConfig(importance_cap=2.0, kl_coef=0.1)), step_module.pack_loss
    model = decoder(case)
    learner = Learner(model, OptimizerConfig(pack_tokens=64), case.loss, OffPolicyConfig(), 1.0, CPU, ranks, ranks.mesh())

    def limited(model: Decoder, pack: Pack, *rest: Any) -> Any:
        loss = pack_loss(model, pack, *rest)
        if len(pack.input_ids) > 20 and ranks.rank == ranks.size - 1:
            raise torch.OutOfMemoryError
        return loss

    step_module.pack_loss = limited
    try:
        learner.probe(longest=9, group=4)
        with pytest.raises(MemoryError) as said:
            learner.probe(longest=30, group=4)
    finally:
        step_module.pack_loss = pack_loss
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert torch.equal(flat(model.parameters()), flat(decoder(case).parameters()))
    return learner.pack_tokens, str(said.value)


def check_publishing(ranks: Ranks, shard_size: int | None) -> None:
    """At first everything is written, later adapters alone: what is spoilt of the frozen weights stays so."""
    model, untouched = decoder(CASES["adapters"]), decoder(CASES["adapters"])
    learner = Learner(model, OptimizerConfig(), LossConfig(), OffPolicyConfig(), 1.0, CPU, ranks, ranks.mesh(shard_size))
    for first in (True, False):
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(7.0)
        learner.publish()
        for weight, before in zip(model.parameters(), untouched.parameters(), strict=True):
            assert torch.equal(weight, before if first or before.requires_grad else torch.full_like(before, 7.0))


def outcomes(ranks: Ranks, names: list[str], shard_size: int | None = None) -> bytes:
    """Pickled here, by value: a pipe would send handles of tensors that end with this process."""
    found = {name: outcome(CASES[name], ranks, shard_size) for name in names}
    if ranks.size > 1:
        check_publishing(ranks, shard_size)
    return pickle.dumps((found, found_room(ranks) if ranks.size > 1 else None))


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of gradients, relative to their norm


def compare(found: Outcome, wanted: Outcome, case: Case) -> None:
    dtype, tolerance = case.dtype, TOLERANCE[case.dtype]
    for mine, theirs in zip(found.learned, wanted.learned, strict=True):
        assert (mine.num_live, mine.skipped, mine.culprits) == (theirs.num_live, theirs.skipped, theirs.culprits)
        assert mine.sums == pytest.approx(theirs.sums, rel=10 * tolerance, abs=10 * tolerance, nan_ok=True)
        assert mine.extras == pytest.approx(theirs.extras, rel=10 * tolerance, abs=10 * tolerance)
    assert len(found.gradients) == len(wanted.gradients)
    for mine, theirs in zip(found.gradients, wanted.gradients, strict=True):
        assert mine.dtype == torch.promote_types(dtype, torch.float32)
        assert (mine - theirs).norm() <= tolerance * theirs.norm()
    way = (wanted.copies[-1] - wanted.copies[0]).double().norm()
    assert (found.weights - wanted.weights).double().norm() <= 30 * tolerance * way  # AdamW divides a small gradient by its own size
    assert torch.equal(found.copies[-1], found.weights.to(dtype))
    assert torch.equal(found.copies[0], wanted.copies[0])
    frozen = {dtype} if case.adapter else set()
    assert found.dtypes == {torch.promote_types(dtype, torch.float32)} | frozen


def check(size: int, names: list[str], shard_size: int | None = None) -> None:
    alone, _ = pickle.loads(outcomes(Ranks.alone(), names))
    for of_rank in on_ranks(size, outcomes, names, shard_size):
        of_cases, room = pickle.loads(of_rank)
        assert room == (16, "cpu has no room for one rollout of 30 tokens; lower bundles.budget, or sampling.cache_mb for more room.")
        for name, found in of_cases.items():
            compare(found, alone[name], CASES[name])


def test_two_ranks_learn_what_one_does() -> None:
    check(2, list(CASES))


@pytest.mark.slow
def test_four_ranks_learn_what_one_does() -> None:
    check(4, list(CASES))


HYBRID = ("untied", "tied, recomputed", "kl and", "float32", "bfloat16", "poisoned", "adapters")


@pytest.mark.slow
def test_groups_of_shards_learn_what_one_does() -> None:
    check(4, [name for name in CASES if name.startswith(HYBRID)], shard_size=2)
