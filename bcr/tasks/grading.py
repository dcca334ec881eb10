"""One answer against its gold answer: an exact fast path for numbers and words, math-verify for everything else.

Nothing here evaluates text as code: of math-verify only the LaTeX extraction is used, a grammar that builds sympy objects, and
guards refuse before it what is only there to burn time (very long, deeply nested, enormous exponents). What passes the guards
may still take long: for text that a model wrote use `bcr.tasks.grader_pool`, whose workers have a deadline and a memory limit.
"""

from __future__ import annotations

import importlib
import logging
import re
from contextvars import ContextVar
from fractions import Fraction
from functools import cache, lru_cache
from math import log10
from typing import Any

from bcr.records import Verdict
from bcr.tasks.answer_forms import Number, read_number, read_words, strip_unit, tidy

MAX_CHARS = 1_000
MAX_DEPTH = 25
MAX_DIGITS = 300  # in one number
MAX_EXPONENT = 10_000
MAX_FACTORIAL = 3_000

UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
LONG_NUMBER = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")
EXPONENT = re.compile(r"\^[\s{(+-]*(\d+)")
TOWER = re.compile(r"\^[\s{(]*(\d+)\s*\^[\s{(]*(\d+)")
FACTORIAL = re.compile(r"(\d+)[\s})]*!")
NESTED_FACTORIAL = re.compile(r"!(?:[\s})]*!){2}")
TOKEN = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
QUICK = ContextVar("QUICK", default=False)  # how the parser predicts: other users of the library keep its default
INTEGER = re.compile(r"-?\d{1,100}")


def grade(gold: str, answer: str | None) -> Verdict:
    """Judge one answer (LaTeX or plain text, without the box around it) against the gold answer.

    None is UNANSWERED; an answer that cannot be read, or that the guards refuse, is UNPARSED. There is no deadline here.
    """
    verdict = grade_simple(gold, answer)
    return grade_symbolic(gold, answer or "") if verdict is None else verdict


def grade_simple(gold: str, answer: str | None) -> Verdict | None:
    """The verdict where it needs no algebra (missing or refused answers, equal texts, numbers, words), else None. Takes microseconds."""
    if answer is None:
        return Verdict.UNANSWERED
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):
        return verdict_of(int(gold) == int(answer))
    if is_refused(answer):
        return Verdict.UNPARSED
    gold, answer = tidy(gold), tidy(answer)
    if not answer:
        return Verdict.UNPARSED
    if squeeze(gold) == squeeze(answer):
        return Verdict.CORRECT
    if is_refused(gold):
        return Verdict.WRONG
    gold_number, answer_number = read_number(gold), read_number(answer)
    if gold_number and answer_number:
        return verdict_of(same_number(gold_number, answer_number))
    gold_words, answer_words = read_words(gold), read_words(answer)
    if gold_words and answer_words:
        if gold_words[0] == answer_words[0]:
            return Verdict.CORRECT
        if gold_words[1] and len(gold_words[0]) > 1:
            return Verdict.WRONG
    return None


def grade_symbolic(gold: str, answer: str) -> Verdict:
    """The verdict of math-verify. Only for pairs that `grade_simple` leaves open: it holds the guards."""
    answer_values = parse_latex(answer)
    if not answer_values:
        return Verdict.UNPARSED
    return verdict_of(math_verify()[0].verify(parse_gold(gold), answer_values, timeout_seconds=None))


def is_refused(text: str) -> bool:
    """Whether the guards keep a text from the parser: empty, too long, too deep, with huge numbers or with control characters."""
    if not text or len(text) > MAX_CHARS or text.isspace() or UNREADABLE.search(text) or LONG_NUMBER.search(text):
        return True
    if any(int(match[1]) > MAX_EXPONENT for match in EXPONENT.finditer(text)):
        return True
    if any(int(match[2]) * log10(int(match[1]) or 1) > log10(MAX_EXPONENT) for match in TOWER.finditer(text)):
        return True
    if any(int(match[1]) > MAX_FACTORIAL for match in FACTORIAL.finditer(text)) or NESTED_FACTORIAL.search(text):
        return True
    return nesting(text) > MAX_DEPTH


def nesting(text: str) -> int:
    """The deepest nesting of brackets of any kind; more than MAX_DEPTH where the braces do not match."""
    depth = deepest = braces = 0
    for char in text:
        if char in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "})]":
            depth -= 1
        braces += (char == "{") - (char == "}")
        if braces < 0:
            return MAX_DEPTH + 1
    return deepest if braces == 0 else MAX_DEPTH + 1


def same_number(gold: Number, answer: Number) -> bool:
    """Equal as written, up to rounding of decimals. A percentage stands for its number or its hundredth, a base only beside another."""
    if gold.base and answer.base and gold.base != answer.base:
        return False
    rounded = gold.decimal or answer.decimal
    if gold.percent == answer.percent:
        return equal(gold.value, answer.value, rounded)
    percent, plain = (gold, answer) if gold.percent else (answer, gold)
    return equal(percent.value, plain.value, rounded) or equal(percent.value / 100, plain.value, rounded)


def equal(gold: Fraction, answer: Fraction, rounded: bool) -> bool:
    """Exactly equal; or, where one is a decimal, the same to 6 places and within a thousandth of each other."""
    if gold == answer or not rounded:
        return gold == answer
    return round(gold, 6) == round(answer, 6) and abs(gold - answer) * 1_000 <= max(abs(gold), abs(answer))


def squeeze(text: str) -> str:
    return "".join(text.split())


def verdict_of(correct: bool) -> Verdict:
    return Verdict.CORRECT if correct else Verdict.WRONG


@lru_cache(maxsize=1_024)
def parse_gold(text: str) -> list[Any]:
    """The values of a gold answer. An equation that says nothing gives its right side: the library reads N=n as n=n, like 1=2."""
    relational: Any = importlib.import_module("sympy.core.relational")
    values = parse_latex(text)
    return [value.rhs if isinstance(value, relational.Equality) and value.lhs == value.rhs else value for value in values]


def parse_latex(text: str) -> list[Any]:
    """The sympy objects that an answer denotes; an empty list where it cannot be read."""
    text = tidy(text)
    if number := read_number(text):
        return [to_sympy(number)]
    boxed = f"\\boxed{{{strip_unit(text)[0]}}}"
    return extract(boxed, quick=True) or extract(boxed, quick=False)


def extract(boxed: str, quick: bool) -> list[Any]:
    """What math-verify reads in a box. Quick prediction (ANTLR's SLL) is ten times faster and right where it reads at all."""
    library, extraction = math_verify()
    token = QUICK.set(quick)
    try:
        return library.parse(boxed, extraction, fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)
    finally:
        QUICK.reset(token)


def to_sympy(number: Number) -> Any:
    """Exact, or a Float where decimals may be rounded. Not below 0.001: math-verify compares a Float to 6 places, where 3.89e-10 is 0."""
    sympy: Any = importlib.import_module("sympy")
    exact = sympy.Rational(number.value.numerator, number.value.denominator)
    return exact.evalf(30) if number.decimal and abs(number.value) >= Fraction(1, 1_000) else exact


@cache
def math_verify() -> tuple[Any, list[Any]]:
    """The library, imported at the first question that needs it, and what to extract: LaTeX, with the units left to `strip_unit`.

    Four things are changed. Its own rule for units, which takes a variable m, s or c at the end for one, is off. Its number tokens are
    read by `sympy_number`, for it hands them to sympify, which evaluates text. Its parser predicts quickly when asked to.
    Its warnings that its timeouts are off are not printed: deadlines are the pool's.
    """
    library: Any = importlib.import_module("math_verify")
    grammar: Any = importlib.import_module("latex2sympy2_extended.latex2sympy2")
    sll = importlib.import_module("antlr4.atn.PredictionMode").PredictionMode.SLL
    create_parser = grammar._Latex2Sympy.create_parser

    def create(converter: Any, text: str) -> Any:
        parser = create_parser(converter, text)
        if QUICK.get():
            parser._interp.predictionMode = sll
        return parser

    grammar._Latex2Sympy.create_parser = create
    assert callable(grammar.convert_number)
    assert callable(grammar._Latex2Sympy.parse_number)
    grammar.convert_number = sympy_number
    grammar._Latex2Sympy.parse_number = lambda _, token: sympy_number(token)
    for module in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(module).setLevel(logging.ERROR)
    normalization = grammar.NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last")
    return library, [library.LatexExtractionConfig(normalization_config=normalization)]


def sympy_number(token: str) -> Any:
    """The sympy number that a token of the grammar denotes: digits with separators, a decimal comma after a leading zero, or a decimal."""
    sympy: Any = importlib.import_module("sympy")
    if token.startswith("0,"):
        token = token.replace(",", ".")
    token = re.sub(r"[,\s]", "", token)
    if not TOKEN.fullmatch(token):
        raise ValueError(f"{token!r} is no number")
    return sympy.Integer(int(token)) if token.isdigit() else sympy.Float(token)
