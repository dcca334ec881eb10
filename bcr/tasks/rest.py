r"""REST's form (arXiv 2507.10541), for comparison: questions Q1, Q2, ... and one `\boxed{}` after the other."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bcr.records import Problem
from bcr.tasks.dialect import Finish, Mark
from bcr.tasks.markdown import closing_brace

BOX = re.compile(r"\\boxed\s*\{")


def ask_rest(problems: Sequence[Problem]) -> str:
    questions = "\n".join(f"Q{k}: {problem.question}" for k, problem in enumerate(problems, start=1))
    return f"{questions}\nAnswer the above questions one by one. Remember to put your final answer within \\boxed{{}}."


def read_rest(text: str, finish: Finish, num_problems: int) -> tuple[list[Mark], tuple[str | None, ...]]:
    r"""The k-th box that closes answers problem k, whatever stands around it; boxes beyond N are not looked at.

    A segment ends with its box, the last one with the completion.

    >>> read_rest("It is \\boxed{2}, and then \\boxed{\\frac{1}{2}}.", "stop", 2)
    ([Mark(start=0, problem=0, answered=True), Mark(start=15, problem=1, answered=True)], ('2', '\\frac{1}{2}'))
    """
    marks = [Mark(0, 0, answered=False)]
    answers: list[str | None] = [None] * num_problems
    at, found = 0, 0
    while found < num_problems and (box := BOX.search(text, at)):
        closing = closing_brace(text, box.end())
        if closing is None:
            break
        answers[found] = text[box.end() : closing].strip()
        marks[-1] = Mark(marks[-1].start, found, answered=True)
        at, found = closing + 1, found + 1
        if found < num_problems and at < len(text):
            marks.append(Mark(at, found, answered=False))
    return marks, tuple(answers)
