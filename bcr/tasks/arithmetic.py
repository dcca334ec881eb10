"""The embedded world: endless multi-step arithmetic modulo 13, small enough that a 0.5 M parameter model learns to reason in it.

A problem is a start value and 2 to 4 operations, applied from left to right: `7 + 3 * 5`. Its difficulty is the number of
operations. A problem is held out when the CRC-32 of its question is a multiple of 10, so training can never have seen it.

    prompt      <bos> Q1 7 + 3 * 5 Q2 4 - 9 + 2 go
    completion  Q1 7 + 3 = 10 10 * 5 = 11 wait check 7 + 3 = 10 10 * 5 = 11 so 11 . Q2 ... so 10 . <eos>
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from bcr.records import Problem
from bcr.tasks.dialect import Finish, Mark, Reading, partition

MODULUS = 13
MAX_PROBLEMS = 6
OPERATIONS = (2, 3, 4)
NUMBERS = [str(n) for n in range(MODULUS)]
MARKERS = [f"Q{k}" for k in range(1, MAX_PROBLEMS + 1)]
SPECIAL = ["<pad>", "<bos>", "<eos>"]
VOCABULARY = [*SPECIAL, *NUMBERS, "+", "-", "*", "=", *MARKERS, "wait", "check", "so", ".", "go"]

Split = Literal["train", "heldout"]


def apply(value: int, operator: str, operand: int) -> int:
    """One operation modulo 13."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % MODULUS


def steps_of(question: str) -> tuple[int, list[tuple[str, int]]]:
    """`"7 + 3 * 5"` -> (7, [("+", 3), ("*", 5)])."""
    words = question.split()
    return int(words[0]), [(operator, int(operand)) for operator, operand in zip(words[1::2], words[2::2], strict=True)]


def solve(question: str) -> int:
    """The answer: 0 to 12.

    >>> solve("7 + 3 * 5")
    11
    """
    value, steps = steps_of(question)
    for operator, operand in steps:
        value = apply(value, operator, operand)
    return value


def is_held_out(question: str) -> bool:
    """One problem in ten, by hash: the same one on every machine and for ever."""
    return zlib.crc32(question.encode()) % 10 == 0


class ArithmeticProblems:
    """Endless problems of one split; problem `index` is a pure function of (seed, split, index), so a cursor is all the state there is."""

    def __init__(self, split: Split, seed: int = 0, operations: Sequence[int] = OPERATIONS) -> None:
        if not operations or min(operations) < 1:
            raise ValueError(f"data.operations is {list(operations)}; it must list numbers of operations of at least 1.")
        self.split, self.seed, self.operations = split, seed, tuple(operations)

    def __getitem__(self, index: int) -> Problem:
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        while True:
            count = rng.choice(self.operations)
            words = [str(rng.randrange(MODULUS))]
            for _ in range(count):
                words += [rng.choice("+-*"), str(rng.randrange(2, MODULUS))]
            question = " ".join(words)
            if is_held_out(question) == (self.split == "heldout"):
                return Problem(f"arithmetic/{self.split}/{self.seed}/{index}", question, str(solve(question)), "arithmetic", float(count))


def teach(question: str, rng: random.Random, slip: float = 0.07, direct: float = 0.05) -> list[str]:
    """A verbose chain of thought, as words after the marker: 1 to 5 passes over the problem, however easy it is.

    Every step slips by one with probability `slip`, and the slip propagates; the answer is the majority of the passes (of
    equals, the latest), so checking really helps. Wrong answers stay in. With probability `direct` it answers without reasoning.
    """
    value, steps = steps_of(question)
    if rng.random() < direct:
        return ["so", str(solve(question)), "."]
    words: list[str] = []
    results: list[int] = []
    for attempt in range(rng.randint(1, 5)):
        if attempt:
            words += ["wait", "check"]
        current = value
        for operator, operand in steps:
            result = apply(current, operator, operand)
            if rng.random() < slip:
                result = (result + rng.choice((1, -1))) % MODULUS
            words += [str(current), operator, str(operand), "=", str(result)]
            current = result
        results.append(current)
    counts = Counter(results)
    best = max(results, key=lambda result: (counts[result], len(results) - 1 - results[::-1].index(result)))
    return [*words, "so", str(best), "."]


def build_tokenizer() -> Tokenizer:
    """One token for each word of the vocabulary: a Hugging Face fast tokenizer (WordLevel)."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return tokenizer


class ArithmeticDialect:
    """`Qk` opens the answer to problem k, `so 11 .` ends it; see `bcr.tasks.dialect` for the rules that all dialects keep.

    A `Qk` beyond the N problems asked is no marker, and nothing its segment says from there on counts.
    """

    max_problems = MAX_PROBLEMS

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = tokenizer.get_vocab()
        missing = [word for word in VOCABULARY if word not in vocabulary]
        if missing:
            raise ValueError(f"data.kind is 'arithmetic', but the model's tokenizer lacks its words, such as {missing[0]!r}.")
        self.tokenizer = tokenizer
        self.ids = vocabulary
        self.words = {index: word for word, index in vocabulary.items()}
        self.stop_token_ids: tuple[int, ...] = (vocabulary["<eos>"],)

    def prompt_ids(self, problems: Sequence[Problem]) -> list[int]:
        asked = [word for marker, problem in zip(MARKERS, problems, strict=False) for word in (marker, *problem.question.split())]
        return self.encode(["<bos>", *asked, "go"])

    def read(self, token_ids: Sequence[int], finish: Finish, num_problems: int) -> Reading:
        words = [self.words.get(token, "") for token in token_ids]  # a padded vocabulary has ids that are no word
        asked = {marker: problem for problem, marker in enumerate(MARKERS[:num_problems])}
        places = [place for place, word in enumerate(words) if word in asked]
        answers: list[str | None] = [None] * num_problems
        marks = []
        for place, stop in zip(places, [*places[1:], len(words)], strict=False):
            last, problem = stop == len(words), asked[words[place]]
            said = None if last and finish == "length" else marked_answer(words[place + 1 : stop - last])  # the last one needs its <eos>
            answers[problem] = answers[problem] if said is None else said
            marks.append(Mark(place, problem, answered=said is not None))
        return Reading(tuple(answers), partition(marks, len(words)))

    def count_checks(self, token_ids: Sequence[int]) -> int:
        return sum(token == self.ids["check"] for token in token_ids)

    def encode(self, words: Sequence[str]) -> list[int]:
        """ValueError for a word that this world does not have."""
        unknown = next((word for word in words if word not in self.ids), None)
        if unknown is not None:
            raise ValueError(f"{unknown!r} is no word of the embedded world; its questions look like '7 + 3 * 5', with numbers 0 to 12.")
        return [self.ids[word] for word in words]


def marked_answer(words: Sequence[str]) -> str | None:
    """What stands between the last `so` and the full stop that ends the words: a number, "" if it is none; None where no answer is marked.

    >>> [marked_answer(text.split()) for text in ("7 + 3 = 10 so 10 .", "so 1 0 .", "so 10 . so")]
    ['10', '', None]
    """
    if not words or words[-1] != "." or "so" not in words or any(word in MARKERS for word in words):
        return None
    inner = words[len(words) - words[::-1].index("so") : -1]
    return inner[0] if len(inner) == 1 and inner[0] in NUMBERS else ""
