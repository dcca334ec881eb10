"""Sampling beside learning, on ranks of its own: the same run, byte for byte, as one whose ranks do both in turn with rollouts that wait a step."""

import time
from pathlib import Path

import pytest

from bcr import train as program
from bcr.rollouts import Batch, RolloutStream
from tests.parallel.launch import on_ranks
from tests.parallel.test_training import cut_off, files, read, run

OPTIONS = ["loss.importance_cap=2", "off_policy.updates=3"]
WAITING = "off_policy.staleness=1"


def at_once(output: str, overrides: list[str]) -> None:
    """The program, in which no side of the second step comes to an end before the other has begun: it stands still if they take turns."""
    place = Path(output).parent
    place.mkdir(parents=True, exist_ok=True)
    learn, ahead = program.Learner.learn_shares, RolloutStream.ahead

    def pause_until_both(mine: str, other: str) -> None:
        (place / mine).touch()
        since = time.monotonic()
        while not (place / other).exists():
            assert time.monotonic() - since < 60, f"{other} has not begun"
            time.sleep(0.01)

    def learn_shares(self: program.Learner, shares: list, step: int) -> program.Learned:
        if step == 1:
            pause_until_both("learning", "sampling")
        return learn(self, shares, step)

    def sample_ahead(self: RolloutStream) -> list[Batch]:
        if self.ranks.rank >= self.ranks.size - self.samplers and self.sampler.policy_version == 1:
            pause_until_both("sampling", "learning")
        return ahead(self)

    program.Learner.learn_shares, RolloutStream.ahead = learn_shares, sample_ahead  # type: ignore[method-assign]
    run(output, overrides)


def train(ranks: int, output: Path, *overrides: str, body=run) -> Path:
    on_ranks(ranks, body, str(output), [*OPTIONS, *overrides], join=False)
    return output


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(1, tmp_path_factory.mktemp("in_turn") / "run", WAITING)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(2, tmp_path_factory.mktemp("beside") / "run", "parallel.samplers=1", body=at_once)


def test_it_is_the_run_whose_rollouts_wait_a_step(in_turn: Path, beside: Path) -> None:
    """With one rank that learns, to the last byte: metrics, rollouts, weights, optimizer state."""
    assert len(read(beside / "metrics.jsonl")) == 4
    assert files(beside) == files(in_turn)
    assert (beside / "learning").exists
