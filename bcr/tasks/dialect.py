"""How problems are asked and answers are marked: prompt text in, answers and segments out.

A dialect turns problems into prompt tokens and reads a completion back. Two exist: `MarkdownDialect` here, for text models, and
`bcr.tasks.arithmetic.ArithmeticDialect` for the embedded world. Both keep the same three rules:

1. **Partition.** Every completion token belongs to exactly one segment. A segment runs from its problem's marker to the next
   marker; what stands before the first marker belongs to the first segment. A completion without a marker is one segment of problem 0.
2. **Format.** An answer counts only if nothing but the next marker, or the end of the completion, follows it. Without this
   rule the tokens after an answer are free and a model learns to ramble in them.
3. **Last one counts.** A problem answered several times is judged by the last answer that keeps rule 2.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from bcr.records import Problem, Segment


@dataclass(frozen=True, slots=True)
class Reading:
    """What a completion says: one answer for each problem of the bundle (None = unanswered), and the segments in their order."""

    answers: tuple[str | None, ...]
    segments: tuple[Segment, ...]


class Dialect(Protocol):
    """What training, evaluation and the demo need of a dialect."""

    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]
    max_problems: int

    def prompt_ids(self, problems: Sequence[Problem]) -> list[int]:
        """The prompt that asks for all of them at once."""
        ...

    def read(self, token_ids: Sequence[int], finish: Literal["stop", "length"], num_problems: int) -> Reading:
        """Answers and segments of one completion."""
        ...

    def count_checks(self, token_ids: Sequence[int]) -> int:
        """How often the completion stops to check itself (metacognitive loops)."""
        ...


def partition(marks: Sequence[tuple[int, int]], length: int) -> tuple[Segment, ...]:
    """Segments that cover 0..length exactly, from (start, problem) marks in rising order of start.

    >>> partition([(2, 0), (5, 1)], 9)
    (Segment(problem=0, start=0, stop=5), Segment(problem=1, start=5, stop=9))
    >>> partition([], 3)
    (Segment(problem=0, start=0, stop=3),)
    """
    if length == 0:
        return ()
    marks = marks or [(0, 0)]
    starts = [0, *(start for start, _ in marks[1:])]
    stops = [*starts[1:], length]
    return tuple(Segment(problem, start, stop) for (_, problem), start, stop in zip(marks, starts, stops, strict=True) if start < stop)


INSTRUCTION = (
    "Solve the following {n} problems one after the other. For each problem k, write the heading '### Problem k', then your reasoning, "
    "and end with a line 'Answer k: \\boxed{{...}}' that holds nothing but the final answer. Stop after the last answer."
)
MARKER = re.compile(r"^#{2,4} Problem (?P<heading>\d{1,4})\b|Answer ?(?P<answer>\d{1,4}) ?:{1,2}\s*\$?\\boxed\{", re.MULTILINE)
FILLER = re.compile(r"[^\w\\]*")  # what may stand between an answer and what follows it: white space, full stops, rules, asterisks
CHECKS = re.compile(r"\b(wait|let me (?:re-?)?check|double[- ]check|let me verify)\b", re.IGNORECASE)


class MarkdownDialect:
    """The paper's form: a heading `### Problem k` for each problem and an answer line `Answer k: \\boxed{...}`.

    Headings are markers; so is an answer line that stands outside the section of its problem. Numbers beyond N mark nothing.
    """

    max_problems = 64

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.stop_token_ids = tuple(stop_token_ids)

    def prompt_ids(self, problems: Sequence[Problem]) -> list[int]:
        questions = "\n\n".join(f"### Problem {k}\n{problem.question}" for k, problem in enumerate(problems, start=1))
        text = f"{INSTRUCTION.format(n=len(problems))}\n\n{questions}\n\n## Solutions\n\n"
        return self.tokenizer.encode(text, add_special_tokens=True).ids

    def read(self, token_ids: Sequence[int], finish: Literal["stop", "length"], num_problems: int) -> Reading:
        text, starts = spell(self.tokenizer, token_ids[:-1] if finish == "stop" else token_ids)
        marks, answers = read_markdown(text, finish, num_problems)
        # The token that holds a marker's first character opens the segment; of two markers in one token the later one does.
        token_marks = {bisect.bisect_right(starts, char) - 1: problem for char, problem in marks}
        return Reading(answers, partition(sorted(token_marks.items()), len(token_ids)))

    def count_checks(self, token_ids: Sequence[int]) -> int:
        return len(CHECKS.findall(spell(self.tokenizer, token_ids)[0]))


def read_markdown(text: str, finish: Literal["stop", "length"], num_problems: int) -> tuple[list[tuple[int, int]], tuple[str | None, ...]]:
    """Marks (first character, problem) and answers of a completion's text.

    >>> read_markdown("### Problem 1\\n1+1=2\\nAnswer 1: \\\\boxed{2}\\nAnswer 2: \\\\boxed{5}", "stop", 2)
    ([(0, 0), (40, 1)], ('2', '5'))
    """
    marks: list[tuple[int, int]] = []
    answers: list[str | None] = [None] * num_problems
    section, answered = None, None  # the open problem; (problem, answer, end of its box) not yet known to keep the format
    box_end = 0

    def settle(following: int) -> None:
        if answered is not None and FILLER.fullmatch(text, answered[2], following):
            answers[answered[0]] = answered[1]

    for match in MARKER.finditer(text):
        problem = int(match["heading"] or match["answer"]) - 1
        if not 0 <= problem < num_problems or match.start() < box_end:
            continue
        settle(match.start())
        answered = None
        if problem != section or match["heading"]:
            marks.append((match.start(), problem))
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


def spell(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of the tokens, and for each token the index of its first character.

    A character spread over several tokens begins where the last of them lies, for only there can it be read. Where bytes that are no
    UTF-8 make the decoder take back what it has already said (vocabularies with byte fallback), these bytes are left out.
    """
    stream, text, starts = DecodeStream(skip_special_tokens=False), [], []
    length = 0
    for token in token_ids:
        try:
            piece = stream.step(tokenizer, token) or ""
        except Exception as error:  # the class that the library raises
            if "Invalid prefix" not in str(error):
                raise
            stream = DecodeStream(skip_special_tokens=False)
            piece = stream.step(tokenizer, token) or ""
        starts.append(length)
        text.append(piece)
        length += len(piece)
    return "".join(text), starts
