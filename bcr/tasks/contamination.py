"""Training problems that a benchmark holds too, found by the word n-grams they share."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bcr.records import Problem

WORD = re.compile(r"[a-z]+|\d+")


@dataclass(frozen=True)
class Overlap:
    """Training problem `id` has this share of the n-grams of benchmark problem `benchmark_id`."""

    id: str
    benchmark_id: str
    share: float


def overlaps(problems: Sequence[Problem], benchmark: Sequence[Problem], n: int = 8, share: float = 0.5) -> list[Overlap]:
    """The training problems that hold at least `share` of a benchmark question's n-grams, each with the benchmark problem it holds most of.

    Words are letters or digits in lower case; LaTeX commands count as words, signs do not. A single shared n-gram is no evidence in
    mathematics ("where m and n are relatively prime positive integers"), hence the share. Questions shorter than n words match whole.
    """
    if n < 1 or not 0 < share <= 1:
        raise ValueError(f"data.exclude: n-grams of {n} words and a share of {share}; n must be at least 1 and the share in (0, 1].")
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = []
    for index, problem in enumerate(benchmark):
        grams = ngrams(problem.question, n)
        sizes.append(len(grams))
        for gram in grams:
            holders[gram].append(index)
    found = []
    for problem in problems:
        shared = Counter(index for gram in ngrams(problem.question, n) for index in holders.get(gram, ()))
        if shared:
            best = max(shared, key=lambda index: shared[index] / sizes[index])
            if shared[best] >= share * sizes[best]:
                found.append(Overlap(problem.id, benchmark[best].id, shared[best] / sizes[best]))
    return found


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """All runs of n words; the whole text where it is shorter.

    >>> sorted(ngrams("What is $3+4$?", 3))
    [('is', '3', '4'), ('what', 'is', '3')]
    """
    words = WORD.findall(text.lower())
    return {tuple(words[k : k + n]) for k in range(max(1, len(words) - n + 1))}
