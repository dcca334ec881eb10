"""The stream of rollouts: how old they are when they are learnt from, and that a copy of its state goes on just so."""

import json

import pytest

from bcr.records import Bundle, Problem, Request, Rollout
from bcr.rollouts import RolloutStream
from bcr.sampler import SamplingParams

PARAMS = SamplingParams(1.0, 2, (0,), seed=0)


class Numbered:
    """Bundles 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.made = 0

    def take(self, count: int) -> list[Bundle]:
        self.made += count
        return [
            Bundle(f"b{number}", (Problem(f"p{number}", "?", "1", "here", 0.5),), [1, 2], 9)
            for number in range(self.made - count, self.made)
        ]

    def state_dict(self) -> dict:
        return {"made": self.made}

    def load_state_dict(self, state: dict) -> None:
        self.made = state["made"]


class Versioned:
    """A sampler of one token, whose log-prob is a float32 that no short decimal is."""

    def __init__(self) -> None:
        self.policy_version = 0

    def generate(self, requests: list[Request], params: SamplingParams) -> list[list[Rollout]]:
        return [[Rollout(r.id, [0], [-0.10000000149011612], "stop", self.policy_version)] * params.n for r in requests]


def stream(staleness: int) -> RolloutStream:
    return RolloutStream(Numbered(), Versioned(), PARAMS, 2, staleness)  # type: ignore[arg-type]


def learn(rollouts: RolloutStream, steps: int) -> list[tuple[list[str], set[int]]]:
    """(bundles, policy versions) of each step, an update after each."""
    seen = []
    for _ in range(steps):
        batch = rollouts.next()
        seen.append(([bundle.id for bundle in batch.bundles], {rollout.policy_version for group in batch.groups for rollout in group}))
        rollouts.sampler.policy_version += 1
    return seen


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_rollouts_are_so_many_updates_old(staleness: int) -> None:
    seen = learn(stream(staleness), 6)
    assert [bundles for bundles, _ in seen] == [[f"b{2 * step}", f"b{2 * step + 1}"] for step in range(6)]
    assert [versions for _, versions in seen] == [{max(0, step - staleness)} for step in range(6)]


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_copy_of_its_state_goes_on_just_so(staleness: int) -> None:
    first, second = stream(staleness), stream(staleness)
    learn(first, 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert list(second.waiting) == list(first.waiting)
    assert learn(second, 4) == learn(first, 4)
