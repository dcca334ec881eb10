"""Metacognitive loops: places where a text stops to doubt or check itself, and text that repeats itself.

A documented list of phrases, English and Chinese, and a measure that needs no list. Phrases are what R1-like models write when they turn
back (the BCR paper, section 1, and "wait" tokens in arXiv 2501.19393); the list is not the paper's, which gives none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

ENGLISH = (
    "wait",
    "hold on",
    "hmm",
    "let me check",
    "let me double-check",
    "let me double check",
    "let me verify",
    "let me re-check",
    "let me recheck",
    "let me reconsider",
    "let me re-examine",
    "let me rethink",
    "let me think again",
    "let me go back",
    "double-check",
    "on second thought",
    "is that right",
    "is that correct",
    "that doesn't seem right",
    "that can't be right",
    "i made a mistake",
    "alternatively",
    "another way to see",
)
CHINESE = (
    "等等",
    "等一下",
    "稍等",
    "让我检查",
    "让我再检查",
    "检查一下",
    "让我验证",
    "验证一下",
    "让我重新",
    "重新考虑",
    "再想想",
    "不对",
    "换一种方法",
    "另一种方法",
)

# Longest first, so that "let me double-check" is one loop and not two; English at word boundaries, Chinese anywhere.
PATTERN = re.compile(
    "|".join(
        [rf"\b{re.escape(phrase)}\b" for phrase in sorted(ENGLISH, key=len, reverse=True)]
        + [re.escape(phrase) for phrase in sorted(CHINESE, key=len, reverse=True)]
    ),
    re.IGNORECASE,
)


def count_loops(text: str) -> int:
    """Phrases of the list in the text; overlapping ones count once.

    >>> count_loops("Wait, let me double-check: 2 + 2 = 4. 等等，让我再检查。")
    4
    """
    return sum(1 for _ in PATTERN.finditer(text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")))


def repetition(tokens: Sequence[int], n: int = 8) -> float:
    """The share of n-grams that occurred before: 0 for a text that never repeats n tokens in a row, near 1 for an endless loop.

    >>> repetition([1, 2, 1, 2, 1, 2], n=2)  # 12 21 12 21 12: three of five were there before
    0.6
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1.")
    grams = Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0
