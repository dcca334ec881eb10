"""Reading the plain forms of an answer exactly and without a parser: numbers, and words such as a name or a letter of choice.

Whatever is not plainly one of these forms is left to `bcr.tasks.grading`, which asks math-verify.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ",
        "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "％": "%", "\u00a0": " ", "\u202f": " ",
    }
)  # fmt: skip
SEPARATOR = re.compile(r"(?<=\d)(?:,\\!\s*|\{,\}|\\,|,\\,|\\!)(?=\d{3}(?!\d))")
WRAPPING = re.compile(r"(?<!\\)\$|\\displaystyle(?![a-zA-Z])|\\!")
LEADING = re.compile(r"^\s*(?:\\approx(?![a-zA-Z])|=)")

DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
DECIMAL = rf"(?:{DIGITS}(?:\.\d*)?|\.\d+)"
PART = rf"(?:\{{\s*([+-]?\s*{DECIMAL})\s*\}}|(\d))"
FRACTION = rf"\\[dtc]?frac\s*{PART}\s*{PART}"
POWER = r"(?:[eE]([+-]?\d{1,3})|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|(\d{1,3})))"

SIGNED = re.compile(r"([+-]?)\s*(?:\\?\$\s*)?(.*)", re.DOTALL)
PLAIN = re.compile(rf"({DECIMAL}){POWER}?")
SLASHED = re.compile(rf"({DIGITS})\s*/\s*({DIGITS})")
STACKED = re.compile(rf"({DIGITS})?\s*{FRACTION}")
BASED = re.compile(r"(\d+)\s*_\s*(?:\{\s*(\d{1,2})\s*\}|(\d))")

PERCENT = re.compile(r"\s*(?:\\?%|\\text\s*\{\s*(?:\\?%|percent)\s*\}|\bpercent)$")
DEGREE = re.compile(r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree)$")
TEXT_UNIT = re.compile(r"[\\\s]*\\(?:text|textnormal|textrm|mbox|mathrm)\s*\{([A-Za-z .,/]*)\}\s*(?:\^\s*(?:\d|\{\s*-?\d\s*\}))?$")
NOT_A_UNIT = re.compile(r"\b(?:dozen|hundred|thousand|million|billion|trillion|and|or|mod|[ap]\.?m)\b", re.IGNORECASE)
PLAIN_UNIT = re.compile(
    r"(?<=[\d}\s])\s*\b(?:(?:square|sq\.?|cubic|cu\.?)\s+)?"
    r"(?:mm|cm|km|kg|mg|lbs?|oz|ft|mph|inch(?:es)?|feet|foot|(?:unit|mile|yard|(?:centi|milli|kilo)?met(?:er|re)|liter|gallon|gram|pound|degree|dollar|"
    r"cent|hour|minute|second|day|week|month|year)s?)(?:\s*\^\s*(?:[23]|\{[23]\}))?$"
)

TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf)\s*\{([^{}\\]*)\}")
WORDS = re.compile(r"\(?([A-Za-z]+(?:[ ,'-]+[A-Za-z]+)*)\)?")


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written. `decimal`: with a point or a power of ten, so it may stand for a rounded value."""

    value: Fraction
    decimal: bool = False
    percent: bool = False  # "62.5%" has the value 62.5
    base: int | None = None  # "52_8" has the value 52 and the base 8


def tidy(text: str) -> str:
    """The same answer without dollar signs around it, thin spaces, a leading equals sign, a full stop at the end and signs beyond ASCII."""
    text = SEPARATOR.sub(",", text.translate(UNICODE))
    text = LEADING.sub("", WRAPPING.sub("", text))
    return text.strip().rstrip(".,;").rstrip()


def read_number(text: str) -> Number | None:
    """The number that a tidy text denotes: integer, decimal, fraction, mixed number, power of ten, percentage, with a unit or not.

    >>> read_number(r"1\\frac{4}{5}").value, read_number("10,080").value, read_number(r"5.4\\text{ cents}").value
    (Fraction(9, 5), Fraction(10080, 1), Fraction(27, 5))
    """
    text, percent = strip_unit(text)
    sign, body = SIGNED.fullmatch(text).groups()  # type: ignore[union-attr]
    number = read_unsigned(body.strip())
    if number is None:
        return None
    value = -number.value if sign == "-" else number.value
    return Number(value, number.decimal, percent, number.base)


def strip_unit(text: str) -> tuple[str, bool]:
    """The text without the unit, degree or percent sign at its end, and whether it was a percentage."""
    bare = PERCENT.sub("", text)
    if bare != text:
        return bare, True
    while (unit := TEXT_UNIT.search(text)) and unit.start() > 0 and not NOT_A_UNIT.search(unit[1]):
        text = text[: unit.start()]
    return DEGREE.sub("", PLAIN_UNIT.sub("", text)), False


def read_unsigned(text: str) -> Number | None:
    if match := PLAIN.fullmatch(text):
        exponent = match[2] or match[3] or match[4]
        return Number(to_fraction(match[1]) * Fraction(10) ** int(exponent or 0), decimal="." in match[1] or exponent is not None)
    if match := SLASHED.fullmatch(text):
        return divide(match[1], match[2])
    if match := STACKED.fullmatch(text):
        quotient = divide(match[2] or match[3], match[4] or match[5])
        if quotient is None or match[1] is None:
            return quotient
        return None if quotient.value < 0 else Number(to_fraction(match[1]) + quotient.value, quotient.decimal)
    if match := BASED.fullmatch(text):
        return Number(Fraction(int(match[1])), base=int(match[2] or match[3]))
    return None


def divide(above: str, below: str) -> Number | None:
    divisor = to_fraction(below)
    return Number(to_fraction(above) / divisor, decimal="." in above + below) if divisor else None


def to_fraction(text: str) -> Fraction:
    return Fraction(re.sub(r"[,\s]", "", text))


def read_words(text: str) -> tuple[str, bool] | None:
    r"""Words in lower case, and whether they were marked as text: `\text{East}` gives ("east", True), `(C)` gives ("C", False).

    A single letter keeps its case, for it may be a variable; single letters in a list have no order: `\text{B and A}` gives ("a,b", True).
    """
    bare = TEXT.sub(r"\1", text).strip()
    match = WORDS.fullmatch(bare)
    if match is None:
        return None
    words = [" ".join(word.split()) for word in re.split(r",\s*and |,| and ", match[1])]
    if len(words) == 1 and len(words[0]) == 1:
        return words[0], bare != text
    if all(len(word) == 1 for word in words):
        words.sort()
    return ",".join(words).lower(), bare != text
