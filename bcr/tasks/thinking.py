"""The thinking part of a completion: where it ends, and which of its passages belong to which problem.

Thinking text has no format, so it is read by its headings and mentions: a line that opens with the name of a problem ("### Problem 2",
"Now, let's move on to the second problem", "Q3:") begins that problem's passage. A mention inside a line, a list of several problems
and "Problem 1's" begin nothing.
"""

from __future__ import annotations

import re

from bcr.tasks.dialect import Mark

OPEN, CLOSE = "<think>", "</think>"

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
CARDINALS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LEAD = (
    "okay|ok|so|now|next|alright|all|right|great|good|well|then|first|finally|lastly|let|lets|let's|let’s|me|us|we|i|i'll|we'll|will|can|need|"
    "start|starting|begin|beginning|with|by|moving|move|on|onto|to|for|the|solve|solving|tackle|tackling|consider|look|looking|at|go|going|turn|"
    "turning|and|that|done|is"
)
MENTION = re.compile(
    rf"^[ \t>*_#-]*(?:(?:{LEAD})[\s,.:;!*_-]+){{0,10}}?"
    rf"(?:(?:problem|question)\s*#?\s*(?P<number>\d{{1,4}}|{'|'.join(CARDINALS)})\b"
    rf"|q\s?(?P<short>\d{{1,4}})\b|(?P<ordinal>{'|'.join(ORDINALS)})\s+(?:problem|question|one)\b)"
    r"(?!['’]s)(?!\s*(?:,|and|&|to|through|-|–)\s*(?:(?:problem|question|q)\s*)?(?:\d|the\s))",
    re.IGNORECASE | re.MULTILINE,
)


def end_of_thinking(text: str, opened: bool) -> int:
    """Index of the first character after the thinking part: 0 where there is none, the text's length where it never closes.

    `opened`: the prompt has already opened it. Thinking ends at its last closing tag; one that opens again after that is thinking too.

    >>> [end_of_thinking(text, opened=False) for text in ("<think>2+2</think>4", "2+2</think>4", "4", "<think>4")]
    [18, 11, 0, 8]
    """
    closed = text.rfind(CLOSE)
    if text.rfind(OPEN) > closed or (opened and closed < 0):
        return len(text)
    return closed + len(CLOSE) if closed >= 0 else 0


def mentions(text: str, num_problems: int) -> list[Mark]:
    """A mark where a line of thinking turns to another problem than the one before.

    >>> [(mark.start, mark.problem) for mark in mentions("Problem 1: easy.\\nAs in problem 1 above.\\nNow the second problem.\\n", 2)]
    [(0, 0), (40, 1)]
    """
    marks: list[Mark] = []
    for match in MENTION.finditer(text):
        problem = number_of(match) - 1
        if 0 <= problem < num_problems and (not marks or marks[-1].problem != problem):
            marks.append(Mark(match.start(), problem))
    return marks


def number_of(match: re.Match[str]) -> int:
    word = (match["number"] or match["short"] or match["ordinal"]).lower()
    for names in (CARDINALS, ORDINALS):
        if word in names:
            return names.index(word) + 1
    return int(word)


def separates(marks: list[Mark], num_problems: int) -> bool:
    """Whether passages of thinking can be told apart: they turn to two problems at least, or there is only one."""
    return num_problems == 1 or len({mark.problem for mark in marks}) > 1
