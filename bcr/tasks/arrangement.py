"""Bundles arranged by difficulty: all equally hard on average (the paper's), or each of problems that are equally hard."""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from bcr.records import Bundle, Problem
from bcr.tasks.bundles import Budget, check_sizes, make_bundle
from bcr.tasks.dialect import Dialect

ARRANGEMENTS = ("mixed", "stratified", "homogeneous")


class ArrangedBundles:
    """Bundles of a finite list, epoch after epoch. `arrangement` is one of

    - "mixed": as the dice fall;
    - "stratified": every bundle has about the mean difficulty of all, made of easy and hard problems;
    - "homogeneous": the problems of a bundle are about equally hard, so bundles are easy or hard.

    Without `count` every epoch is arranged anew over the whole list; what does not fill a last bundle sits out that epoch. With `count`
    that many bundles are made once, from problems spread evenly over all difficulties, and every epoch asks the same ones in a new
    order (the paper: 3,000 bundles of N = 3). Everything is keyed by (seed, epoch): two cursors are the whole state.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        dialect: Dialect,
        sizes: Mapping[int, float],
        budget: Budget,
        arrangement: str = "stratified",
        count: int | None = None,
        seed: int = 0,
    ) -> None:
        check_sizes(sizes, budget, dialect.max_problems)
        if arrangement not in ARRANGEMENTS:
            raise ValueError(f"bundles.arrangement is {arrangement!r}; it must be one of {', '.join(ARRANGEMENTS)}.")
        if arrangement != "mixed":
            unknown = [problem.id for problem in problems if problem.difficulty is None]
            if unknown:
                raise ValueError(
                    f"bundles.arrangement is {arrangement!r}, but {len(unknown)} problems have no difficulty, such as {unknown[0]!r}."
                )
        self.problems, self.dialect, self.sizes, self.budget = problems, dialect, dict(sizes), budget
        self.arrangement, self.count, self.seed = arrangement, count, seed
        self.epoch, self.place = 0, 0
        self._bundles: tuple[int, list[list[Problem]]] = (-1, [])
        smallest = min(sizes) if count is None else sum(self._drawn_sizes(random.Random(f"{seed}/sizes/0")))
        if count is not None and count < 1:
            raise ValueError(f"bundles.count is {count}; it must be at least 1.")
        if smallest > len(problems):
            raise ValueError(f"bundles.count and bundles.sizes call for {smallest} problems; the data has {len(problems)}.")

    def take(self, count: int) -> list[Bundle]:
        """The next `count` bundles."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Bundle:
        if self._bundles[0] != self.epoch:
            self._bundles = self.epoch, self._arranged(self.epoch)
        bundles = self._bundles[1]
        bundle = make_bundle(f"bundle/{self.seed}/{self.epoch}/{self.place}", bundles[self.place], self.dialect, self.budget)
        self.place += 1
        if self.place == len(bundles):
            self.epoch, self.place = self.epoch + 1, 0
        return bundle

    def _arranged(self, epoch: int) -> list[list[Problem]]:
        rng = random.Random(f"{self.seed}/sizes/{epoch if self.count is None else 0}")
        sizes = self._drawn_sizes(rng)
        bundles = arrange(spread(self.problems, sum(sizes), rng), sizes, self.arrangement, rng)
        random.Random(f"{self.seed}/order/{epoch}").shuffle(bundles)
        return bundles

    def _drawn_sizes(self, rng: random.Random) -> list[int]:
        """Sizes of the bundles of an epoch: `count` of them, or as many as the problems suffice for."""
        choices, shares = list(self.sizes), list(self.sizes.values())
        if self.count is not None:
            return rng.choices(choices, shares, k=self.count)
        sizes, room = list[int](), len(self.problems)
        while (size := rng.choices(choices, shares)[0]) <= room:
            sizes.append(size)
            room -= size
        return sizes or [min(choices)]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


def spread(problems: Sequence[Problem], count: int, rng: random.Random) -> list[Problem]:
    """`count` of the problems, evenly spaced over the order of their difficulties (those without one count as 0), ties in random order."""
    order = sorted(rng.sample(range(len(problems)), len(problems)), key=lambda index: problems[index].difficulty or 0.0)
    step = len(problems) / count
    offset = rng.random() * step
    return [problems[order[min(len(problems) - 1, int(offset + k * step))]] for k in range(count)]


def arrange(problems: Sequence[Problem], sizes: Sequence[int], arrangement: str, rng: random.Random) -> list[list[Problem]]:
    """The problems in bundles of these sizes, which add up to their number. The order within a bundle is random."""
    shuffled = rng.sample(list(problems), len(problems))
    if arrangement == "stratified":
        bundles = stratified(shuffled, sizes)
    else:
        in_order = sorted(shuffled, key=lambda problem: problem.difficulty or 0.0) if arrangement == "homogeneous" else shuffled
        bundles = [in_order[stop - size : stop] for stop, size in zip(accumulate(sizes), sizes, strict=True)]
    return [rng.sample(bundle, len(bundle)) for bundle in bundles]


def stratified(problems: Sequence[Problem], sizes: Sequence[int]) -> list[list[Problem]]:
    """Bundles whose mean difficulties are about equal: from the hardest problem down, each goes where the hardest ones are still needed.

    What a bundle needs is the mean difficulty its open places must have for the bundle to reach the mean of all. Bundles of one problem
    cannot be balanced: they get problems spread evenly over all difficulties first.
    """
    difficulty = {id(problem): problem.difficulty or 0.0 for problem in problems}
    in_order = sorted(problems, key=lambda problem: -difficulty[id(problem)])
    mean = sum(difficulty.values()) / len(difficulty)
    bundles: list[list[Problem]] = [[] for _ in sizes]
    singles = [index for index, size in enumerate(sizes) if size == 1]
    if singles:
        step = len(in_order) / len(singles)
        chosen = [int((k + 0.5) * step) for k in range(len(singles))]
        for bundle, place in zip(singles, chosen, strict=True):
            bundles[bundle].append(in_order[place])
        taken = set(chosen)
        in_order = [problem for place, problem in enumerate(in_order) if place not in taken]
    queue = [(-mean, 0, index) for index, size in enumerate(sizes) if size > 1]  # (-needed mean, problems held, bundle)
    heapq.heapify(queue)
    sums = [0.0] * len(sizes)
    for problem in in_order:
        _, held, index = heapq.heappop(queue)
        bundles[index].append(problem)
        sums[index] += difficulty[id(problem)]
        open_places = sizes[index] - held - 1
        if open_places:
            heapq.heappush(queue, (-(sizes[index] * mean - sums[index]) / open_places, held + 1, index))
    return bundles
