r"""The paper's form: a heading `### Problem k` for each problem and an answer line `Answer k: \boxed{...}`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bcr.records import Problem
from bcr.tasks.dialect import Finish, Mark

INSTRUCTION = (
    "{task} For each problem k, write the heading '### Problem k', then your reasoning, "
    "and end with a line 'Answer k: \\boxed{{...}}' that holds nothing but the final answer. Stop after the last answer."
)
DECORATION = r"[*_\s]*"  # **Answer 1:** and **Answer 1**: are answer lines too
MARKER = re.compile(
    r"^#{2,4} Problem (?P<heading>\d{1,4})\b"
    rf"|Answer ?(?P<answer>\d{{1,4}}){DECORATION}[:：]{{1,2}}(?:[\s*_$]|\\[(\[])*\\boxed\s*\{{",
    re.MULTILINE,
)
# What may stand between an answer and what follows it: white space, full stops, rules, asterisks, the end of a formula or of thinking.
FILLER = re.compile(r"(?:</?think>|\\[)\]]|[^\w\\])*")


def ask_markdown(problems: Sequence[Problem]) -> str:
    """The instruction and one heading with its question for each problem."""
    questions = "\n\n".join(f"### Problem {k}\n{problem.question}" for k, problem in enumerate(problems, start=1))
    task = f"Solve the following {len(problems)} problems one after the other." if len(problems) > 1 else "Solve the following problem."
    return f"{INSTRUCTION.format(task=task)}\n\n{questions}"


def read_markdown(text: str, finish: Finish, num_problems: int) -> tuple[list[Mark], tuple[str | None, ...]]:
    """Marks and answers of a completion's text. Headings are markers; so is an answer line outside the section of its problem.

    Numbers beyond N mark nothing, and neither does anything inside a box.

    >>> marks, answers = read_markdown("### Problem 1\\n1+1=2\\nAnswer 1: \\\\boxed{2}\\nAnswer 2: \\\\boxed{5} or 6", "stop", 2)
    >>> marks, answers
    ([Mark(start=0, problem=0, answered=True), Mark(start=40, problem=1, answered=False)], ('2', None))
    """
    marks: list[Mark] = []
    answers: list[str | None] = [None] * num_problems
    section, answered = None, None  # the open problem; (problem, answer, end of its box) not yet known to keep the format
    box_end = 0

    def settle(following: int) -> None:
        if answered is not None and FILLER.fullmatch(text, answered[2], following):
            answers[answered[0]] = answered[1]
            marks[-1] = Mark(marks[-1].start, marks[-1].problem, answered=True)

    for match in MARKER.finditer(text):
        problem = int(match["heading"] or match["answer"]) - 1
        if not 0 <= problem < num_problems or match.start() < box_end:
            continue
        settle(match.start())
        answered = None
        if problem != section or match["heading"]:
            marks.append(Mark(match.start(), problem, answered=False))
            section = problem
        if match["answer"]:
            closing = closing_brace(text, match.end())
            if closing is not None:
                box_end = closing + 1
                answered = (problem, text[match.end() : closing].strip(), box_end)
    if finish == "stop":
        settle(len(text))
    return marks, tuple(answers)


def closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before `start`; None where it never closes. Escaped braces do not count."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None
