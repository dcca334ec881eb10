"""Bundles: N problems in one prompt under one token budget, N fixed or drawn from a mixture."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from bcr.records import Bundle, Problem, Request
from bcr.tasks.dialect import Dialect


class Problems(Protocol):
    """Anything that gives problem `index` (from 0): endless generators, and files that start over when they are used up."""

    def __getitem__(self, index: int) -> Problem: ...


@dataclass(frozen=True)
class Budget:
    """The shared cap on new tokens: a total, or so many for each problem. Exactly one is given."""

    total: int | None = None
    per_problem: int | None = None

    def __post_init__(self) -> None:
        if (self.total is None) == (self.per_problem is None):
            raise ValueError("bundles.budget and bundles.budget_per_problem: give exactly one of them, and leave the other null.")
        if self.per_problem is not None and self.per_problem < 1:
            raise ValueError(f"bundles.budget_per_problem is {self.per_problem}; it must be at least 1.")

    def tokens(self, num_problems: int) -> int:
        return self.total if self.total is not None else num_problems * (self.per_problem or 0)


def mixture(sizes: Sequence[int], shares: Sequence[float] | None = None) -> dict[int, float]:
    """N -> share; equal shares where none are given.

    >>> mixture([1, 3])
    {1: 1.0, 3: 1.0}
    """
    if len(set(sizes)) != len(sizes):
        raise ValueError(f"bundles.sizes is {list(sizes)}; name every N once and use bundles.shares to weigh them.")
    if shares is not None and len(shares) != len(sizes):
        raise ValueError(f"bundles.shares has {len(shares)} numbers for the {len(sizes)} of bundles.sizes; give one for each.")
    return dict(zip(sizes, shares or [1.0] * len(sizes), strict=True))


def check_sizes(sizes: Mapping[int, float], budget: Budget, max_problems: int) -> None:
    """Raise ValueError for a mixture that cannot be trained: no sizes, N < 1, N beyond the dialect, a budget under one token a problem."""
    if not sizes:
        raise ValueError("bundles.sizes is empty; name at least one N, such as [3].")
    for size, share in sizes.items():
        if not 1 <= size <= max_problems:
            raise ValueError(f"bundles.sizes has N = {size}; this dialect can put 1 to {max_problems} problems in one prompt.")
        if not share > 0:
            raise ValueError(f"bundles.shares gives N = {size} the share {share}; shares must be positive.")
        if budget.tokens(size) < size:
            raise ValueError(f"bundles.budget is {budget.tokens(size)} tokens for N = {size} problems, less than one token for each.")


class BundleStream:
    """Bundles one after the other. Its whole state is two cursors: bundles made and problems consumed.

    The size of bundle b is drawn from `sizes` (N -> share) by a generator keyed with (seed, b): no stream of random numbers to save.
    """

    def __init__(self, problems: Problems, dialect: Dialect, sizes: Mapping[int, float], budget: Budget, seed: int = 0) -> None:
        check_sizes(sizes, budget, dialect.max_problems)
        self.problems, self.dialect, self.budget, self.seed = problems, dialect, budget, seed
        self.sizes, self.shares = list(sizes), list(sizes.values())
        self.bundles_made = 0
        self.problems_consumed = 0

    def take(self, count: int) -> list[Bundle]:
        """The next `count` bundles."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Bundle:
        size = random.Random(f"{self.seed}/size/{self.bundles_made}").choices(self.sizes, self.shares)[0]
        problems = tuple(self.problems[self.problems_consumed + k] for k in range(size))
        bundle = make_bundle(f"bundle/{self.seed}/{self.bundles_made}", problems, self.dialect, self.budget)
        self.bundles_made += 1
        self.problems_consumed += size
        return bundle

    def state_dict(self) -> dict[str, int]:
        return {"bundles_made": self.bundles_made, "problems_consumed": self.problems_consumed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.bundles_made, self.problems_consumed = state["bundles_made"], state["problems_consumed"]


class Stream(Protocol):
    """Bundles one after the other, with cursors as their state."""

    def take(self, count: int) -> list[Bundle]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SeparateContexts:
    """The same bundles, but each problem is asked in a context of its own; the budget stays shared. Its state is that of the stream."""

    def __init__(self, bundles: Stream, dialect: Dialect) -> None:
        self.bundles, self.dialect = bundles, dialect

    def take(self, count: int) -> list[Bundle]:
        return [
            replace(bundle, prompts=[self.dialect.prompt_ids([problem]) for problem in bundle.problems])
            for bundle in self.bundles.take(count)
        ]

    def state_dict(self) -> dict[str, Any]:
        return self.bundles.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bundles.load_state_dict(state)


def make_bundle(id: str, problems: Sequence[Problem], dialect: Dialect, budget: Budget) -> Bundle:
    """One bundle of exactly these problems in this order."""
    return Bundle(id, tuple(problems), dialect.prompt_ids(problems), budget.tokens(len(problems)))


def consecutive_bundles(problems: Sequence[Problem], size: int, dialect: Dialect, budget: Budget, name: str) -> list[Bundle]:
    """The problems in their order, `size` at a time: what evaluation asks. The last bundle may be smaller, so that none is left out."""
    return [
        make_bundle(f"{name}/n{size}/{start}", problems[start : start + size], dialect, budget) for start in range(0, len(problems), size)
    ]


def cyclic_bundles(problems: Sequence[Problem], size: int, dialect: Dialect, budget: Budget, name: str) -> list[Bundle]:
    """Each problem with the `size` - 1 that follow it, the first ones after the last: every problem stands once at every position (REST).

    As many bundles as problems, so each problem is asked `size` times.
    """
    if size > len(problems):
        raise ValueError(f"sizes has N = {size}, and there are {len(problems)} problems: cyclic bundles would ask one twice.")
    twice = [*problems, *problems]
    return [make_bundle(f"{name}/cyclic{size}/{start}", twice[start : start + size], dialect, budget) for start in range(len(problems))]


def as_request(bundle: Bundle) -> Request:
    """What the sampler is asked for a bundle: its prompt and its whole budget, under the bundle's id."""
    return Request(bundle.id, bundle.prompt_ids, bundle.budget)


def longest_prompt(problems: Sequence[Problem], dialect: Dialect, size: int) -> int:
    """Tokens of the prompt that holds the `size` longest questions: no bundle of these problems has more, but for a token or two."""
    lengths = [len(encoding.ids) for encoding in dialect.tokenizer.encode_batch_fast([problem.question for problem in problems])]
    longest = sorted(range(len(problems)), key=lengths.__getitem__, reverse=True)[:size]
    return len(dialect.prompt_ids([problems[index] for index in longest]))
