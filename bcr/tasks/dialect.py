"""How problems are asked and answers are marked: prompt text in, answers and segments out.

A dialect turns problems into prompt tokens and reads a completion back: `bcr.tasks.text.TextDialect` for text models (the paper's
Markdown form and REST's), `bcr.tasks.arithmetic.ArithmeticDialect` for the embedded world. All keep the same rules:

1. **Partition.** Every completion token belongs to exactly one segment. A segment runs from its problem's marker to the next
   marker; what stands before the first marker belongs to the first segment. A completion without a marker is one segment of problem 0.
2. **Format.** An answer counts only if nothing but the next marker, or the end of the completion, follows it. Without this
   rule the tokens after an answer are free and a model learns to ramble in them. (REST's form, there for comparison, lacks the rule.)
3. **Last one counts.** A problem answered several times is judged by the last answer that keeps rule 2.
4. **A marker alone answers nothing.** A segment says whether it leaves its problem with an answer; until one does, the problem is
   open, and later segments stay answerable for it. So headings without work, and skipped problems, gain nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from bcr.records import Problem, Segment

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a completion says: one answer for each problem of the bundle (None = unanswered), and the segments in their order."""

    answers: tuple[str | None, ...]
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """A marker of `problem` at `start` (a character or a token); `answered` as in `Segment`."""

    start: int
    problem: int
    answered: bool = True


class Dialect(Protocol):
    """What training, evaluation and the demo need of a dialect."""

    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]
    max_problems: int

    def prompt_ids(self, problems: Sequence[Problem]) -> list[int]:
        """The prompt that asks for all of them at once."""
        ...

    def read(self, token_ids: Sequence[int], finish: Finish, num_problems: int) -> Reading:
        """Answers and segments of one completion."""
        ...

    def count_checks(self, token_ids: Sequence[int]) -> int:
        """How often the completion stops to check itself (metacognitive loops)."""
        ...


def partition(marks: Sequence[Mark], length: int) -> tuple[Segment, ...]:
    """Segments that cover 0..length exactly, from marks in rising order of start. Without a mark nothing is answered.

    >>> [(segment.problem, segment.start, segment.stop) for segment in partition([Mark(2, 0), Mark(5, 1)], 9)]
    [(0, 0, 5), (1, 5, 9)]
    >>> partition([], 3)
    (Segment(problem=0, start=0, stop=3, answered=False),)
    """
    if length == 0:
        return ()
    marks = marks or [Mark(0, 0, answered=False)]
    starts = [0, *(mark.start for mark in marks[1:])]
    stops = [*starts[1:], length]
    spans = zip(marks, starts, stops, strict=True)
    return tuple(Segment(mark.problem, start, stop, mark.answered) for mark, start, stop in spans if start < stop)


BROKEN = 32  # tokens without a whole character among them, after which the decoder is helped on


def spell(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of the tokens, and for each token the index of its first character. Linear in the number of tokens.

    A character spread over several tokens begins where the last of them lies, for only there can it be read. Where bytes that are no
    UTF-8 make the decoder take back what it has already said (vocabularies with byte fallback), these bytes are left out.
    """
    stream, text, starts = DecodeStream(skip_special_tokens=False), list[str](), list[int]()
    length = 0
    pending: list[int] = []  # tokens that the decoder holds back, waiting for a character to be whole
    for token in token_ids:
        starts.append(length)
        pending.append(token)
        try:
            piece = stream.step(tokenizer, token)
        except Exception as error:  # the class that the library raises
            if "Invalid prefix" not in str(error):
                raise
            stream, pending = DecodeStream(skip_special_tokens=False), [token]
            piece = stream.step(tokenizer, token)
        if piece is None and len(pending) >= BROKEN:
            piece, pending = say_broken(tokenizer, pending)
            stream = DecodeStream(skip_special_tokens=False)
            for held in pending:
                stream.step(tokenizer, held)
        elif piece is not None:
            pending = []
        text.append(piece or "")
        length += len(piece or "")
    return "".join(text), starts


def say_broken(tokenizer: Tokenizer, token_ids: list[int]) -> tuple[str, list[int]]:
    """Text of the longest part of a run of broken bytes that no later byte can change, and the tokens after it.

    The decoder decodes all that it holds anew with every token, so it must never hold much. The run may be cut wherever both parts,
    decoded apart, give the text of the whole: no character, and no beginning of one, lies across that place.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    whole = decode(token_ids)
    for cut in range(len(token_ids) - 1, 0, -1):
        said = decode(token_ids[:cut])
        if said + decode(token_ids[cut:]) == whole:
            return said, token_ids[cut:]
    return whole, []
