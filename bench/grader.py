"""How many verdicts a minute does the grader give? `python -m bench.grader [--workers 2] [--seconds 10]`

Integers are decided in the calling process. The other rows are answers as models write them to golds like those of MATH-500, each pair
new to the cache: all forms, and only those that go to the workers. Targets on 2 cores: 600,000 and 10,000 a minute. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

from bcr.records import Verdict
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.grading import grade_simple

Pair = tuple[str, str]

# Golds of MATH-500 with a right and a wrong answer, in the proportion of their forms there: 3 of 5 are integers. {k} makes them new.
FORMS: list[tuple[str, str, str]] = [
    ("{k}", "{k}", "{k}1"),
    ("{k}", r"{k}.0", r"-{k}"),
    ("{k}", r"{k}\text{{ units}}", r"{k}\text{{ or }}2"),
    ("{k}", r"\${k}", r"x={k}1"),
    ("{k}", "{k}", "{k}5"),
    ("{k}", "{k}", "{k}7"),
    ("{k}", "{k}", r"\frac{{{k}}}{{3}}"),
    ("{k}", "{k}", r"\sqrt{{{k}}}"),
    ("{k}", "{k}", "{k}0"),
    (r"\frac{{{k}}}{{7}}", r"\dfrac{{{k}}}{{7}}", r"\frac{{{k}}}{{9}}"),
    (r"\frac{{{k}}}{{7}}", r"{k}/7", r"\frac{{{k}\pi}}{{7}}"),
    (r"{k}\sqrt{{13}}", r"\sqrt{{13}} \cdot {k}", r"{k}\sqrt{{11}}"),
    (r"\left( {k}, \frac{{\pi}}{{2}} \right)", r"({k}, \pi/2)", r"(\frac{{\pi}}{{2}}, {k})"),
    ("x^3+{k}x-6", "x^3-6+{k}x", "x^3-{k}x-6"),
    ("(3,{k}]", r"\left(3, {k}\right]", "[3,{k}]"),
    ("{k},-2", "-2, {k}", "{k},2"),
    (
        r"\begin{{pmatrix}} {k} \\ -14 \end{{pmatrix}}",
        r"\begin{{pmatrix}} {k} \\ -14.0 \end{{pmatrix}}",
        r"\begin{{pmatrix}} 14 \\ {k} \end{{pmatrix}}",
    ),
]


def integers() -> Iterator[Pair]:
    k = 0
    while True:
        k += 1
        yield str(k), str(k + k % 2)


def math_like(symbolic_only: bool) -> Iterator[Pair]:
    k = 0
    while True:
        k += 1
        for gold, right, wrong in FORMS:
            pair = (gold.format(k=k), (right if k % 2 else wrong).format(k=k))
            if not symbolic_only or grade_simple(*pair) is None:
                yield pair


def per_minute(pool: GraderPool, source: Iterator[Pair], batch: int, seconds: float) -> tuple[float, dict[str, int]]:
    """Median over three runs of the verdicts a minute, in batches as a training step would hand them over; and counts of verdicts."""
    counts = dict.fromkeys(map(str, Verdict), 0)
    rates = []
    for _ in range(3):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 3:
            for verdict in pool.grade([next(source) for _ in range(batch)]):
                counts[verdict] += 1
            done += batch
        rates.append(done / (time.perf_counter() - start) * 60)
    return statistics.median(rates), {verdict: count for verdict, count in counts.items() if count}


def first_use_s(workers: int) -> float:
    """Seconds until a pool that has just been made has started its template and judged one pair."""
    start = time.perf_counter()
    with GraderPool(workers) as pool:
        pool.grade([("x+1", "1+x")])
        return time.perf_counter() - start


def replacement_ms() -> float:
    """Milliseconds that a killed worker costs beyond its deadline: median of what is left of ten rounds of one hang and one good pair."""
    with GraderPool(1, deadline_s=0.2) as pool:
        pool.grade([("x", "y")])
        rounds = []
        for k in range(10):
            start = time.perf_counter()
            pool.grade([("x+1", f"(x+y+z+w+1)^{{{2000 + k}}} - (x+y+z+w)^{{{2000 + k}}}"), ("x+1", f"x+{k}")])
            rounds.append((time.perf_counter() - start - 0.2) * 1e3)
        return statistics.median(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="for each row")
    arguments = parser.parse_args()
    rows: list[tuple[str, Callable[[], Iterator[Pair]], int]] = [
        ("integers", integers, 10_000),
        ("MATH-500-like", lambda: math_like(symbolic_only=False), 500),
        ("MATH-500-like, workers only", lambda: math_like(symbolic_only=True), 500),
    ]
    results: dict[str, object] = {"workers": arguments.workers, "python": platform.python_version(), "math_verify": version("math-verify")}
    with GraderPool(arguments.workers, deadline_s=5.0) as pool:
        pool.grade([("x", "y")])
        print(f"{'pairs':<30}{'a minute':>12}  verdicts")
        for name, source, batch in rows:
            rate, counts = per_minute(pool, source(), batch, arguments.seconds)
            print(f"{name:<30}{rate:>12,.0f}  {counts}")
            results[name] = round(rate)
        results["slowest_s"] = round(pool.slowest_s, 3)
    results["first_use_s"] = round(first_use_s(arguments.workers), 2)
    results["replacement_ms"] = round(replacement_ms(), 1)
    print(
        f"slowest verdict {results['slowest_s']} s, first use {results['first_use_s']} s, replacing a worker {results['replacement_ms']} ms"
    )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
