"""Contamination: copies are found however they are set, common phrases are not, and real data sets agree."""

from pathlib import Path

import pytest

from bcr.records import Problem
from bcr.tasks.contamination import Overlap, overlaps
from bcr.tasks.problems import read_file

DATA = Path(__file__).parents[3] / "shared" / "data"

AYA = (
    "Every morning Aya goes for a $9$-kilometer walk and stops at a coffee shop afterwards. When she walks at a constant speed of $s$ "
    "kilometers per hour, it takes her 4 hours. Find $m+n$, where $m$ and $n$ are relatively prime positive integers."
)


def asked(*questions):
    return [Problem(f"p{k}", question, "0", "test") for k, question in enumerate(questions)]


BENCHMARK = [Problem("b0", AYA, "1", "bench"), Problem("b1", "Compute $1+1$.", "2", "bench")]


@pytest.mark.parametrize(
    ("question", "found"),
    [
        (AYA, "b0"),
        (AYA.replace("$", "").upper().replace(".", " ."), "b0"),
        ("A warm-up first. " + AYA + " Answer in one line.", "b0"),
        (AYA.replace("Aya", "Ben"), "b0"),
        ("compute \\(1 + 1\\)", "b1"),
        ("Compute $1+1$ and then $2+2$.", None),  # a question of few words must match whole
        ("A fair die is thrown. Find $m+n$, where $m$ and $n$ are relatively prime positive integers.", None),
        ("Every morning Ben eats 3 eggs.", None),
    ],
)
def test_copies_are_found_and_phrases_are_not(question, found):
    assert [overlap.benchmark_id for overlap in overlaps(asked(question), BENCHMARK)] == ([found] if found else [])


def test_the_share_is_of_the_benchmark_question():
    half = asked("one two three four five six")
    benchmark = [Problem("b", "one two three four five six seven eight nine", "0", "bench")]
    assert overlaps(half, benchmark, n=3, share=0.5) == [Overlap("p0", "b", 4 / 7)]
    assert overlaps(half, benchmark, n=3, share=0.6) == []


@pytest.mark.parametrize(("n", "share"), [(0, 0.5), (8, 0.0), (8, 1.5)])
def test_settings_without_sense_are_refused(n, share):
    with pytest.raises(ValueError, match=r"n must be at least 1 and the share in \(0, 1\]"):
        overlaps([], [], n, share)


def test_a_benchmark_finds_itself_and_its_copies():
    """Every benchmark question is found in itself; of the GSM8K training split almost nothing stands in its test split."""
    if not DATA.exists():
        questions = asked(*(f"Ann has {n} apples, {n} pears and {n + 2} plums. How many pieces of fruit has she in all?" for n in range(9)))
        assert len(overlaps(questions, questions)) == 9
        return
    test, train = (read_file(DATA / name) for name in ("eval/gsm8k.jsonl", "train/gsm8k.jsonl"))
    assert {overlap.id for overlap in overlaps(test, test, share=1.0)} == {problem.id for problem in test}
    assert len(overlaps(train, test)) < 0.01 * len(train)
