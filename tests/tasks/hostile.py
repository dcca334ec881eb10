"""Answers that try to hang, crash, bloat or take over a grader."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

TRACE = "grader-was-hijacked"  # the file that code smuggled in an answer would create

KINDS: list[Callable[[int], str]] = [
    # numbers beyond all memory: the first of each pair is for the guards, the second slips past them
    lambda k: "9^{" * (3 + k % 9) + "9" + "}" * (3 + k % 9),
    lambda k: f"{k + 7}^{{({k + 9})^{{(9)^{{9}}}}}}",
    lambda k: "1" * (100_000 + k),
    lambda k: "1" * 250 + f"^{{{9_000 + k % 900}}} + x",
    lambda k: f"10^{{{10 ** (5 + k % 30)}}}",
    lambda k: f"(((10^{{{100 + k}}})^{{100}})^{{100}})^{{100}} + x",
    lambda k: f"{10_000 + k}!",
    lambda k: f"((({6 + k % 20}!)!)!)",
    lambda k: f"\\binom{{10^{{{9 + k}}}}}{{5 \\cdot 10^{{{8 + k}}}}}",
    lambda k: f"1e{10 ** (3 + k % 20)}",
    lambda k: f"0.{'0' * 280}{k}^{{-{9_000 + k % 900}}}",
    # depth and length
    lambda k: "(" * (1_000 + k) + "1" + ")" * (1_000 + k),
    lambda k: "{" * (500_000 + k) + "}" * (500_000 + k),
    lambda k: "{" * (1_000_000 + k),
    lambda k: "\\frac{1}{" * (20 + k % 4) + "x" + "}" * (20 + k % 4),
    lambda k: "\\sqrt{" * 22 + f"x+{k}" + "}" * 22,
    lambda k: "+".join(f"x^{{{i}}}" for i in range(k % 40, k % 40 + 110)),
    lambda k: "-" * 900 + str(k),
    lambda k: "|" * (60 + k % 9) + "x" + "|" * (60 + k % 9),
    lambda k: "\\text{" * 20 + "a" * k + "}" * 20,
    # algebra that does not end
    lambda k: "".join(f"(x_{{{i}}}+y_{{{i}}}+{k})" for i in range(40)) + "^{9}",
    lambda k: f"\\int_0^1 \\frac{{\\sin(x^{{{k % 90 + 7}}})}}{{\\sqrt{{1+x^{{{k % 50 + 3}}}}}}} dx",
    lambda k: f"\\sum_{{n=1}}^{{{10**6 + k}}} \\frac{{1}}{{n^{{n}}+{k}}}",
    lambda k: f"\\prod_{{n=1}}^{{{10**6 + k}}} (n^2+1)",
    lambda k: f"\\lim_{{x \\to 0}} \\frac{{\\sin(\\tan(x)) - \\tan(\\sin(x))}}{{x^{{{7 + k % 20}}}}}",
    lambda k: f"\\sin(\\cos(\\tan(\\sin(\\cos(\\tan(x^{{{k % 99}}}))))))^{{{100 + k % 99}}} + \\sqrt[{k % 97 + 3}]{{x+1}}",
    lambda k: f"(x+y+z+w+1)^{{{2_000 + k}}} - (x+y+z+w)^{{{2_000 + k}}}",
    lambda k: f"x^{{{4_000 + k}}} + x + 1 = 0",
    lambda k: f"\\sqrt{{2}}+\\sqrt{{3}}+\\sqrt{{5}}+\\sqrt{{7}}+\\sqrt{{11}}+\\sqrt{{13}}+\\sqrt{{17}} = {k}",
    # matrices
    lambda k: f"\\begin{{pmatrix}} {k + 900}! & {k + 901}! \\\\ {k + 902}! & {k + 903}! \\end{{pmatrix}}^{{{k + 99}}}",
    lambda k: f"\\operatorname{{eye}}({10_000 + k})",
    lambda k: f"\\operatorname{{zeros}}({10**5 + k},{10**5})",
    lambda k: f"\\operatorname{{rank}}(\\operatorname{{ones}}({900 + k},900))",
    lambda k: (
        "\\det\\begin{pmatrix}" + "\\\\".join("&".join(f"x^{{{i * j + k % 9}}}" for i in range(9)) for j in range(9)) + "\\end{pmatrix}"
    ),
    # code
    lambda k: f'__import__("os").system("touch {TRACE}-{k}")',
    lambda k: f'\\text{{__import__("os").system("touch {TRACE}-{k}")}}',
    lambda k: f"\\operatorname{{exec}}(open('{TRACE}-{k}', 'w'))",
    lambda k: f"eval(\"open('{TRACE}-{k}','w')\")",
    lambda k: f"().__class__.__base__.__subclasses__()[{k}]",
    lambda k: f"lambda: open('{TRACE}-{k}','w')",
    lambda k: f"\\operatorname{{open}}(\\text{{{TRACE}-{k}}})",
    # bytes that break transports and parsers
    lambda k: "\x00" * (k + 1),
    lambda k: f"{k}\x00",
    lambda k: "\ud800" * (k % 50 + 1),
    lambda k: f"\\text{{\udfff{k}}}",
    lambda k: chr(0x202E) + str(k) + chr(0x1F600) * 50,
    lambda k: "\n" * k + "\r\t",
    lambda k: "\\" * (k % 400 + 1),
    lambda k: "\\boxed{" * (k % 12 + 1) + "}" * (k % 12 + 1),
    lambda k: f"}}\\boxed{{{k}",
]


def hostile() -> Iterator[str]:
    """Different strings without end, one of each kind in turn."""
    for k in itertools.count():
        for kind in KINDS:
            yield kind(k)
