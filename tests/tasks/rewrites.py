"""Other ways to write a gold answer, and near misses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from bcr.tasks.answer_forms import Number, read_number, read_words, tidy

DATA = Path(__file__).parents[3] / "shared" / "data"

SAMPLE = [  # of every form that occurs in the benchmarks: used where the data is not there
    "204", "-10", "+2", "58,500", r"10,\!080", r"\$32,\!348", "1.25", ".0000672", r"\frac{14}{3}", r"\frac43", r"\frac{9}{256}", "-3/2",
    r"1\frac{4}{5}", r"336^\circ", r"$4^{\circ}$", r"5.4 \text{ cents}", r"864 \mbox{ inches}^2", r"\frac{270}7\text{ degrees}",
    r"$8 \%$", "62.5%", "1e-5", "4.5e33", r"8.7 \times 10^{8}", r"3.61e-10", "52_8", r"4210_{5}", r"3\sqrt{13}", r"\frac{3\sqrt{3}}{4}",
    r"18+2\pi", r"\frac{20000}{\pi}", "6 - 5i", "9i", "p - q", "x^5 - x^4 + x^3 - x^2 + x - 1", "(a+5)(b+2)", r"\cot x",
    r"\frac{11+9a}{20}", r"\frac{1}{\sqrt{2}}c", r"x=5", r"$f(x)=a x+b$, where $b$ is any", r"5x - 7y + 11z + 4 = 0", r"$k \geqslant 2$",
    r"$M=2^{N-2}+1$", r"y^{\prime}+ry-rx(t)=0", r"1 \pm \sqrt{19}", "1,-2", "3, 5, 7", "$69$,$84$", r"-2 \text{ or } -12",
    r"\left( 3, \frac{\pi}{2} \right)", "(6,31,-1)", "(3,4]", r"(2,\infty)", r"(0,9) \cup (9,36)", r"x \in [-2,7]", r"$6m$",
    r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\text{Evelyn}", r"\text{(C)}",
    r"\text{A, B}", r"(-\infty, 0) \cup\{1\}.", r"I(0)e^{-\frac{t}{RC}}", r"$\frac{100!}{2^{50}}$",
    r"$\left\lfloor\log _{2} n\right\rfloor+1$", "5:6", r"8\!:\!34 \text{ p.m.}",
]  # fmt: skip


def golds(every: int = 1) -> list[str]:
    """The different gold answers of the benchmarks, or each `every`th of them; the sample where there is no data."""
    files = sorted((DATA / "eval").glob("*.jsonl"))
    found = {str(json.loads(line)["answer"]) for file in files for line in file.read_text().splitlines()}
    return sorted(found)[::every] + SAMPLE if found else SAMPLE


def rewrites(gold: str) -> Iterator[str]:
    """The gold itself, equal answers in other words, and wrong ones that look alike."""
    text = tidy(gold)
    number, words = read_number(text), read_words(text)
    yield gold
    if number and number.base is None:
        yield from number_rewrites(number)
    elif words and words[1]:
        yield from (words[0], rf"\text{{{words[0].upper()}}}", rf"\textbf{{({words[0]})}}", r"\text{zebra}")
    else:
        yield from expression_rewrites(text)


def number_rewrites(number: Number) -> Iterator[str]:
    value, sign = number.value, "-" if number.value < 0 else ""
    above, below = abs(value.numerator), value.denominator
    yield from (str(value + 1), str(-value), f"{value},{value + 1}", f"{sign}{above}/{below}", rf"{sign}\dfrac{{{above}}}{{{below}}}")
    yield from (rf"\frac{{{3 * value.numerator}}}{{{3 * below}}}", rf"{sign}\sqrt{{\frac{{{above**2}}}{{{below**2}}}}}", f"x={value}")
    if below == 1:
        yield from (
            f"{value}.0",
            f"{value.numerator:,}",
            rf"{value}\text{{ cm}}",
            rf"{value} \mbox{{ square inches}}",
            rf"{value}^\circ",
            rf"{value}\%",
        )
        yield from (rf"{sign}\${above}", rf"{value} \times 10^{{0}}", f"{value}e0")
    if 1 < abs(value) < 10**6 and below > 1:
        yield from (f"{float(value):.8f}", f"{float(value):.1f}", rf"{sign}{above // below}\frac{{{above % below}}}{{{below}}}")


def expression_rewrites(text: str) -> Iterator[str]:
    if not re.search(r"[=<>,:]|\\in |\\geq|cup|text|matrix|pm|infty|where", text):
        yield from (f"({text})", f"{text}+0", rf"1 \cdot ({text})", rf"\frac{{2({text})}}{{2}}", f"-({text})", f"{text}+1")
    if equation := re.fullmatch(r"([a-zA-Z])\s*=\s*([^=,]+)", text):
        yield from (equation[2], f"{equation[2]}={equation[1]}", f"{text}+1")
    if re.fullmatch(r"[^()\[\]{}a-z]+(,[^()\[\]{}a-z]+)+", text):
        parts = text.split(",")
        yield from (
            ", ".join(reversed(parts)),
            r"\{" + text + r"\}",
            ", ".join(parts[:-1]) + r" \text{ and } " + parts[-1],
            ", ".join(parts[:-1]),
        )
        yield r" \text{ or } ".join(f"x={part}" for part in parts)
    if re.fullmatch(r"(\\left)?\s*[(\[][^()\[\]]+,[^()\[\]]+[)\]]", text):
        core = re.sub(r"\\left|\\right", "", text).strip()
        inside = core[1:-1].split(",")
        yield from (core, rf"\left{core[:-1]}\right{core[-1]}", core[0] + ",".join(reversed(inside)) + core[-1], ",".join(inside))
        yield ("[" if core[0] == "(" else "(") + core[1:]
    if text.count(r"\cup") == 1:
        left, right = text.split(r"\cup")
        yield rf"{right} \cup {left}"
    if text.count(r"\pm") == 1 and "{" not in text.split(r"\pm")[0]:
        yield text.replace(r"\pm", "-") + ", " + text.replace(r"\pm", "+")
