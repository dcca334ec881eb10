"""How completions of the embedded world are read: segments partition them whatever they hold, an answer counts only as the format asks.

Token soup must never fail. For completions built from parts the right reading is known beforehand: parts are well-formed answers,
answers followed by something, missing ones, repeated ones, markers beyond N, cut-off ends.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from bcr.records import Problem
from bcr.tasks.arithmetic import MARKERS, VOCABULARY, ArithmeticDialect, build_tokenizer, marked_answer, teach
from bcr.tasks.dialect import Mark, partition
from tests.tasks.reading_cases import calm, finishes, owners, owners_by_marks

WORDS = ArithmeticDialect(build_tokenizer())
NUMBERS = [str(number) for number in range(13)]
WORK = ["+", "-", "*", "=", "wait", "check", "3", "12", "so", ".", "go", "<pad>", "<bos>"]


@calm
@given(st.dictionaries(st.integers(0, 29), st.integers(0, 3)), st.integers(30, 40))
def test_partition_gives_every_token_to_the_last_mark_before_it(marks, length):
    in_order = sorted(marks.items())
    segments = partition([Mark(place, problem, answered=problem > 0) for place, problem in in_order], length)
    assert owners(segments) == owners_by_marks(in_order, length)
    assert [segment.start for segment in segments[1:]] == [place for place, _ in in_order[1:]]
    assert len(segments) == max(1, len(marks))
    assert [segment.answered for segment in segments] == ([problem > 0 for _, problem in in_order] or [False])
    assert partition([Mark(0, 1)], 0) == ()


def read_words(text, finish, num_problems):
    return WORDS.read(WORDS.encode(text.split()), finish, num_problems)


@calm
@given(st.lists(st.integers(0, len(VOCABULARY) + 3), max_size=60), finishes, st.integers(1, 6))
def test_any_words_are_read_and_partitioned(ids, finish, num_problems):
    """Also ids that the model has and the tokenizer has not: vocabularies are padded."""
    reading = WORDS.read(ids, finish, num_problems)
    places = [(place, VOCABULARY[token]) for place, token in enumerate(ids) if token < len(VOCABULARY)]
    marks = [(place, MARKERS.index(word)) for place, word in places if word in MARKERS[:num_problems]]
    assert owners(reading.segments) == owners_by_marks(marks, len(ids))
    assert len(reading.segments) == (max(1, len(marks)) if ids else 0)
    assert len(reading.answers) == num_problems
    assert all(answer is None or answer == "" or answer in NUMBERS for answer in reading.answers)


@st.composite
def word_parts(draw, num_problems):
    """(words after the marker, the answer they mark or None where they break the format)."""
    work = draw(st.lists(st.sampled_from(WORK), max_size=6))
    answer = draw(st.sampled_from(NUMBERS))
    kind = draw(st.sampled_from(["right"] * 4 + ["ramble", "missing", "unread", "empty", "unfinished", "beyond", "nothing"]))
    if kind == "beyond" and num_problems < len(MARKERS):
        return [*work, "so", answer, ".", draw(st.sampled_from(MARKERS[num_problems:])), "so", "5", "."], None
    silent = [word for word in work if word not in ("so", ".")]
    return {
        "right": ([*work, "so", answer, "."], answer),
        "ramble": ([*work, "so", answer, ".", "wait"], None),
        "missing": (silent, None),
        "unread": ([*work, "so", answer, "3", "."], ""),
        "empty": ([*work, "so", "."], ""),
        "unfinished": ([*silent, "so", answer], None),
        "beyond": ([*silent, "."], None),
        "nothing": ([], None),
    }[kind]


@st.composite
def word_completions(draw):
    """A completion with problems in any order, repeated or left out, and the reading it must get."""
    num_problems, finish = draw(st.integers(1, 6)), draw(finishes)
    words = draw(st.lists(st.sampled_from(WORK), max_size=3))
    marks, answers = [], [None] * num_problems
    order = draw(st.lists(st.integers(0, num_problems - 1), max_size=8))
    for turn, problem in enumerate(order):
        part, answer = draw(word_parts(num_problems))
        marks.append((len(words), problem))
        words += [MARKERS[problem], *part]
        if answer is not None and (finish == "stop" or turn < len(order) - 1):
            answers[problem] = answer
    words += ["<eos>"] * (finish == "stop")
    return words, finish, num_problems, marks, tuple(answers)


@settings(calm, max_examples=300)
@given(word_completions())
def test_a_completion_built_from_parts_is_read_as_built(completion):
    words, finish, num_problems, marks, answers = completion
    reading = WORDS.read(WORDS.encode(words), finish, num_problems)
    assert reading.answers == answers
    assert owners(reading.segments) == owners_by_marks(marks, len(words))


def test_segments_of_words_say_whether_they_answer():
    reading = read_words("Q1 so 10 . Q2 wait Q3 so 4 . wait Q1 Q2 so 1 1 . Q3 so 4 . <eos>", "stop", 3)
    assert [(segment.problem, segment.answered) for segment in reading.segments] == [
        (0, True),
        (1, False),
        (2, False),
        (0, False),
        (1, True),  # marked, though it is no number: the grader's matter
        (2, True),
    ]
    assert not read_words("so 4 . <eos>", "stop", 2).segments[0].answered
    assert not read_words("Q1 so 4 .", "length", 2).segments[0].answered


@calm
@given(st.permutations(range(4)), st.integers(0, 2**32), st.integers(0, 1000))
def test_the_teacher_is_understood_in_any_order_and_cut_anywhere(order, seed, cut):
    """Whole, every answer counts. Cut off, those count whose answer is followed by the next marker."""
    rng = random.Random(seed)
    lessons = {problem: teach("7 + 3 * 5", rng, slip=0.3) for problem in order}
    words = [word for problem in order for word in (MARKERS[problem], *lessons[problem])]
    said = tuple(lessons[problem][-2] for problem in range(4))
    assert WORDS.read(WORDS.encode([*words, "<eos>"]), "stop", 4).answers == said

    kept = words[: cut % (len(words) + 1)]
    reached = [problem for problem in order if MARKERS[problem] in kept]
    counted = {problem: said[problem] for problem in reached[:-1]}
    reading = WORDS.read(WORDS.encode(kept), "length", 4)
    assert reading.answers == tuple(counted.get(problem) for problem in range(4))
    assert [segment.problem for segment in reading.segments] == (reached or [0] * bool(kept))


@pytest.mark.parametrize(
    ("text", "finish", "answers"),
    [
        ("Q1 7 + 3 = 10 so 10 . Q2 so 4 . <eos>", "stop", ("10", "4")),
        ("Q2 so 4 . Q1 so 10 . <eos>", "stop", ("10", "4")),
        ("Q1 so 10 . Q2 so 4 .", "length", ("10", None)),  # the last answer must be followed by <eos>
        ("Q1 so 10 . Q2 so", "length", ("10", None)),
        ("Q1 so 10 . wait Q2 so 4 . <eos>", "stop", (None, "4")),  # something follows the answer
        ("Q1 so 10 . Q2 so 4 . wait <eos>", "stop", ("10", None)),
        ("Q1 so 10 . Q3 so 3 . Q2 so 4 . <eos>", "stop", (None, "4")),  # Q3 was not asked
        ("Q1 so 10 . Q2 so 4 . Q1 so 9 . <eos>", "stop", ("9", "4")),  # the last one counts ...
        ("Q1 so 10 . Q2 so 4 . Q1 so <eos>", "stop", ("10", "4")),  # ... that keeps the format
        ("Q1 so 10 . so 9 . Q2 <eos>", "stop", ("9", None)),
        ("so 10 . <eos>", "stop", (None, None)),
        ("Q1 so 1 0 . Q2 so . <eos>", "stop", ("", "")),  # marked, but no number
        ("Q1 so + . Q2 so Q1 . <eos>", "stop", ("", None)),
        ("<eos>", "stop", (None, None)),
        ("", "length", (None, None)),
    ],
)
def test_words_by_hand(text, finish, answers):
    assert read_words(text, finish, 2).answers == answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [("so 10 .", "10"), ("so 3 . so 10 .", "10"), ("so 10", None), ("10 .", None), ("so Q1 .", None), ("so 3 so .", ""), ("", None)],
)
def test_what_marks_an_answer(text, answer):
    assert marked_answer(text.split()) == answer


def test_the_prompt_of_the_embedded_world():
    problems = [Problem(str(k), question, "0", "test") for k, question in enumerate(("7 + 3 * 5", "4 - 9 + 2"))]
    words = [VOCABULARY[token] for token in WORDS.prompt_ids(problems)]
    assert " ".join(words) == "<bos> Q1 7 + 3 * 5 Q2 4 - 9 + 2 go"
    assert WORDS.stop_token_ids == (VOCABULARY.index("<eos>"),)
    assert WORDS.max_problems == 6


def test_checks_are_counted():
    assert WORDS.count_checks(WORDS.tokenizer.encode("Q1 7 wait check 7 wait check so 7 . <eos>").ids) == 2


def test_a_tokenizer_without_the_words_is_refused():
    with pytest.raises(ValueError, match="tokenizer lacks its words, such as '<pad>'"):
        ArithmeticDialect(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
