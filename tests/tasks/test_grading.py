import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import math_verify
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from bcr.records import Verdict
from bcr.tasks import grading
from bcr.tasks.answer_forms import read_number, tidy
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.grading import grade, grade_simple
from tests.tasks.hostile import KINDS
from tests.tasks.rewrites import SAMPLE, golds, rewrites

REPO = Path(__file__).parents[2]
YES, NO, UNREAD = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSED

CASES = [
    # numbers, however they are written
    ("204", "204", YES), ("204", "0204", YES), ("204", "205", NO), ("-7", "7", NO), ("-7", "−7", YES), ("+2", "2", YES),
    ("72", "72.", YES), ("72", "$72$", YES), ("58,500", "58500", YES), (r"10,\!080", "10080", YES), ("10080", "10{,}080", YES),
    (r"11,\! 111,\! 111,\! 100", "11111111100", YES), ("1234", "1,2,3,4", NO), (r"\$32,\!348", "32348", YES), ("18", r"\$18", YES),
    ("18", r"\$18.00", YES), ("0.15", ".15", YES), ("1.25", r"\frac{5}{4}", YES), (r"\frac43", "4/3", YES),
    (r"\frac43", r"\dfrac{8}{6}", YES), (r"\frac43", "1.333333", YES), (r"\frac43", "1.33", NO), ("1/3", "0.3333", NO),
    (r"-\frac{35}{9}", r"\frac{-35}{9}", YES), (r"1\frac{4}{5}", "1.8", YES), (r"1\frac{4}{5}", r"\frac{9}{5}", YES),
    (r"1\frac{4}{5}", r"1 \cdot \frac{4}{5}", NO), (r"\frac{1}{0}", "5", NO), ("4.5e33", r"4.5 \times 10^{33}", YES),
    ("1e-5", "0.00001", YES), ("3.89e-10", "0", NO), ("3.89e-10", "4e-10", NO), (r"8.7 \times 10^{8}", "870000000", YES),
    ("1.70e4", "x=17000", YES), ("3.89e-10", "x=0", NO), ("5", r"\sqrt{25}", YES), ("5", "x=5", YES), ("x=5", "5", YES),
    ("x=5", "y=5", NO), ("5", "= 5", YES),
    # percentages, units, bases
    (r"8 \%", "8", YES), (r"8 \%", "0.08", YES), (r"8 \%", "80", NO), ("62.5%", "62.5", YES), ("50", r"50\%", YES), ("0.5", r"50\%", YES),
    ("0.5", r"5\%", NO), (r"336^\circ", "336", YES), ("336", r"336^{\circ}", YES), (r"5.4 \text{ cents}", "5.4", YES),
    (r"864 \mbox{ inches}^2", "864", YES), ("12", "12 cm", YES), (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}", YES),
    (r"12\pi", r"12\pi \text{ cm}^2", YES), ("5", r"5 \text{ million}", NO), ("6", r"5 \text{ or 6}", NO), ("52_8", "52", YES),
    ("52_8", "52_{8}", YES), ("4210_5", "4210_6", NO), ("52_8", "42", NO), ("5", "5 xy", NO), ("6", "6m", NO), ("6m", "6", NO),
    # words
    (r"\text{Evelyn}", "evelyn", YES), (r"\text{east}", r"\text{West}", NO), (r"\text{(C)}", "C", YES),
    (r"\text{(C)}", r"\textbf{(C)}", YES), ("(C)", "D", NO), (r"\text{A, B}", "B and A", YES), (r"\text{A, B}", "A", NO),
    (r"\text{even}", "4", NO), (r"\text{two lines}", "Two  lines", YES), ("m", "n", NO),
    # algebra
    ("6 - 5i", "-5i+6", YES), ("x^2-1", "(x-1)(x+1)", YES), ("x^2", "y^2", NO), (r"\cot x", r"\frac{\cos x}{\sin x}", YES),
    ("a + b + c", "c+b+a", YES), ("a + b + c", "a+b", NO), (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}", YES),
    ("3, 5, 7", r"7, 5 \text{ and } 3", YES), ("3, 5, 7", "3, 5", NO), ("(3,4]", "[3,4]", NO), ("(1,-2)", "(-2,1)", NO),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", YES), (r"(2,\infty)", "x > 2", NO), ("x > 2", r"(2,\infty)", YES),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2.0 \end{pmatrix}", YES),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", NO), ("y = 2x + 3", "2x - y + 3 = 0", YES),
    ("y = 2x + 3", "1=2", NO), ("$M=2^{N-2}+1$", "M=1+2^{N-2}", YES),
    # nothing to judge
    ("5", "", UNREAD), ("5", "   ", UNREAD), ("5", "$$", UNREAD), ("5", "\\frac{", UNREAD), ("5", "}{", UNREAD), ("5", "\x00", UNREAD),
    ("5", "\ud800", UNREAD), ("5", r"\frac{0}{0}", NO), ("5", r"\infty", NO), ("5", r"\{\}", NO), (r"\emptyset", r"\{\}", YES),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer", "verdict"), CASES)
def test_grade(gold: str, answer: str, verdict: Verdict) -> None:
    assert grade(gold, answer) == verdict


def test_no_answer_is_unanswered() -> None:
    assert grade("5", None) == Verdict.UNANSWERED
    assert grade_simple(r"\sqrt{2}", None) == Verdict.UNANSWERED
    assert grade_simple(r"\sqrt{2}", r"\frac{2}{\sqrt{2}}") is None


def test_a_gold_is_right_against_itself_even_where_it_cannot_be_read() -> None:
    unread = r"$f(x)=a x+b$, where $b$ is an arbitrary integer and $\mho(a)=0$"
    assert grade(unread, unread) == YES
    assert grade(unread, "f(x)=x") == NO
    assert grade("", ".") == UNREAD


def test_the_fast_path_loads_no_library() -> None:
    program = (
        "import sys; from bcr.tasks.grading import grade; from bcr.tasks.grader_pool import GraderPool;"
        r"print(grade('1/2', '0.5'), grade(r'\text{east}', 'east'), grade('3', '{' * 9));"
        "print([module for module in ('torch', 'sympy', 'math_verify') if module in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert output == "correct correct unparsed\n[]\n"


@pytest.mark.parametrize(
    "answer",
    ["1" * 100_000, "9^{9^{9^{9}}}", "10^{10^{10}}", "10^{99999999}", "10000!", "((5!)!)!", "(" * 30 + "1" + ")" * 30, "{" * 1_000_000],
)
def test_guards_refuse_before_anything_is_parsed(answer: str) -> None:
    assert grade_simple("7", answer) == UNREAD
    assert grade_simple(answer, "7") in (NO, UNREAD)


def test_guards_let_the_benchmarks_pass() -> None:
    assert [gold for gold in golds() if grading.is_refused(gold)] == []


def test_no_text_becomes_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a number reaches sympy's evaluator from the grammar."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("text was evaluated")

    answers = [
        "x^2+2.5x+1,000",
        r"10,\!080 + y",
        r"0,5",
        r"\operatorname{gcd}(12, 18)",
        r"\begin{pmatrix} 1 & 2.5 \end{pmatrix}",
        r"\max(1, 2)",
        r"f(3, 4)",
    ]
    assert grade("x", "y+z") == NO  # loads the libraries, which evaluate texts of their own
    assert all(grading.parse_latex(answer) for answer in answers)
    monkeypatch.setattr("sympy.parsing.sympy_parser.eval_expr", fail)
    grading.math_verify()[0].parser.parse_latex_cached.cache_clear()
    grading.math_verify()[0].parser.extract_latex.cache_clear()
    assert all(grading.parse_latex(answer) for answer in answers)
    quick = [kind(3) for kind in KINDS if '"' in kind(3) or "open" in kind(3)]
    assert len(quick) > 5
    for answer in quick:
        if grade_simple("x+1", answer) is None:
            grading.parse_latex(answer)


signs = st.sampled_from(["", "-", "+"])
digits = st.integers(0, 10**7).map(str)
grouped = st.integers(1_000, 10**9).map("{:,}".format)
decimals = st.builds("{}.{:0{}d}".format, st.integers(0, 9_999), st.integers(0, 999_999), st.integers(1, 6))
fractions = st.builds(
    lambda form, above, below: form.format(above, below),
    st.sampled_from(["{}/{}", r"\frac{{{}}}{{{}}}", r"\dfrac{{{}}}{{{}}}", r"\frac {{{}}} {{{}}}"]),
    st.integers(0, 999),
    st.integers(1, 999),
)
mixed = st.builds(r"{}\frac{{{}}}{{{}}}".format, st.integers(1, 99), st.integers(1, 99), st.integers(2, 99))
endings = st.sampled_from(["", "", "", r"^\circ", r"^{\circ}", r"\text{ cm}", r" \mbox{ inches}^2"])
numbers = st.builds(lambda sign, body, ending: sign + body + ending, signs, digits | grouped | decimals | fractions | mixed, endings)


@settings(max_examples=400, deadline=None)
@given(numbers, numbers, st.booleans())
@example("0.333333", "1/3", False)
@example("0.5", r"\frac{1}{2}", False)
@example("-0", "0", False)
@example("1/552", "0.5", True)
def test_fast_path_and_math_verify_never_contradict_each_other_on_numbers(gold: str, answer: str, same: bool) -> None:
    if same:  # the value of the gold, written as the answer's kind is
        number = read_number(tidy(gold))
        assert number is not None
        answer = (
            f"{number.value.numerator}/{number.value.denominator}" if "/" in answer or "frac" in answer else f"{float(number.value):.6f}"
        )
    verdict = grade_simple(gold, answer)
    assert verdict in (YES, NO)
    assume(not any(re.search(pattern, gold + " " + answer) for *_, pattern in JUDGED.values()))
    assert direct(gold, answer) == (verdict == YES)


def test_no_answer_fits_every_gold() -> None:
    jokers = [
        "3=8765",
        "x=x",
        "0=0",
        "x^2+1=0",
        r"1 \ne 1",
        r"\{\}",
        r"\frac{0}{0}",
        r"\infty",
        r"\mathbb{R}",
        r"x \in \mathbb{R}",
        "()",
        "nan",
    ]
    pairs = [(gold, joker) for gold in [*SAMPLE, "$N=n$"] for joker in jokers]
    with GraderPool(workers=2, deadline_s=3.0) as pool:
        verdicts = pool.grade(pairs)
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict == YES] == []


def test_quick_prediction_reads_what_the_full_one_reads() -> None:
    parser = grading.math_verify()[0].parser
    quickly_read = 0
    for text in {answer for gold in golds(every=40) for answer in rewrites(gold)}:
        readings = []
        for quick in (True, False):
            parser.parse_latex_cached.cache_clear()
            readings.append(grading.extract(f"\\boxed{{{text}}}", quick))
        assert not readings[0] or str(readings[0]) == str(readings[1])
        quickly_read += bool(readings[0])
    assert quickly_read > 200


def direct(gold: str, answer: str) -> bool:
    """What math-verify says when it is asked itself, with its own settings but for the extraction that evaluates text."""
    extraction = [math_verify.LatexExtractionConfig()]
    values = [
        math_verify.parse("\\boxed{" + re.sub(r"(?<!\\)\$", "", text) + "}", extraction, parsing_timeout=None) for text in (gold, answer)
    ]
    return bool(math_verify.verify(*values, timeout_seconds=None))


# Where the verdict differs from math-verify's own, on purpose: an example of each kind, and how to tell the kind.
JUDGED: dict[str, tuple[str, str, Verdict, str]] = {
    "a power of ten is a number: the library reads 4.5e33 as 4.5 times E times 33": (
        "4.5e33",
        "4" + "5".ljust(33, "0"),
        YES,
        r"\d[eE][+-]?\d",
    ),
    "a power of ten is compared exactly, the library gives up or rounds to 15 digits": (
        r"8.7 \times 10^{8}",
        "870000000",
        YES,
        r"\\times 10\^",
    ),
    "a percentage is its number or its hundredth: the library cannot read a percent sign in a box": ("50", r"50\%", YES, "%"),
    "a letter at the end is a variable: the library takes m, c, s and others for units": (
        "$6m$",
        "6",
        NO,
        r"[\d}\s][othclsgmd]\)*\$?$|[\d}\s][othclsgmd]\$?\+[01]$",
    ),
    "a number in another base is another number": ("4210_{5}", "4210_{6}", NO, r"\d_"),
    "a full stop at the end is no part of the answer": (r"(-\infty, 0) \cup\{1\}.", r"\{1\} \cup (-\infty, 0)", YES, r"\.\$?$"),
    "small decimals are compared in proportion: the library rounds to 6 places": ("0.0000001", "0.0000002", NO, r"\.000"),
    "a number with a sign or in degrees has separators too: the library reads the set of -2 and 19": (
        "-2019",
        "-2,019",
        YES,
        r"[+-]\s*\d+,\d{3}|,\d{3}(?:\.\d*)?\s*\^",
    ),
    "an equation that says nothing is its right side: the library reads n=n, which fits every equation without a solution": (
        "$N=n$",
        "N=n+1",
        NO,
        "N=n",
    ),
    "letters in a list have no order: the library takes the text for one name": (r"\text{A, B}", "B, A", YES, r"\\text\{[A-Z],"),
}


@pytest.mark.parametrize("kind", JUDGED)
def test_judged_disagreements_are_still_disagreements(kind: str) -> None:
    gold, answer, verdict, pattern = JUDGED[kind]
    assert grade(gold, answer) == verdict
    assert direct(gold, answer) != (verdict == YES)
    assert re.search(pattern, gold) or re.search(pattern, answer)


def disagreements(gold: str) -> list[tuple[str, str, Verdict]]:
    """The rewrites of a gold answer on which the grader and the library differ in a way that is not judged above."""
    patterns = [pattern for *_, pattern in JUDGED.values()]
    pairs = [
        (gold, answer, grade(gold, answer))
        for answer in rewrites(gold)
        if not any(re.search(p, gold) or re.search(p, answer) for p in patterns)
    ]
    return [(gold, answer, verdict) for gold, answer, verdict in pairs if (verdict == YES) != direct(gold, answer)]


def test_agrees_with_math_verify_on_a_sample() -> None:
    assert [row for gold in golds(every=15) for row in disagreements(gold)] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_agrees_with_math_verify_on_every_gold() -> None:
    assert [row for gold in golds() for row in disagreements(gold)] == []
