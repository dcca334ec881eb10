"""How completions in Markdown are read: built from parts, whose right reading is known beforehand, cut off, and by hand.

Parts are well-formed answers, answers followed by something, missing and repeated ones, markers beyond N, markers and braces inside a box.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.records import Problem
from bcr.tasks.dialect import Mark, Reading
from bcr.tasks.markdown import closing_brace, read_markdown
from tests.tasks.reading_cases import BYTES, EOS, MERGING, TOKENIZERS, calm, dialect_of, finishes, owners, owners_by_marks

atoms = st.sampled_from(["a", "1", "é", "漢", " ", "+", "\\{", "\\}", "\\\\", "\\frac", "\n### Problem 1\n", "Answer 2: \\boxed{7}", "\n"])
contents = st.recursive(
    st.lists(atoms, max_size=4).map("".join), lambda inner: st.lists(st.one_of(atoms, inner.map("{{{}}}".format)), max_size=4).map("".join)
)
plain = st.sampled_from(["", "1", " a ", "\\frac{1}{2}", "{{a}}", "\\{1, é\\}"])  # without a marker inside
reasoning = st.text("ab1 +=.é漢🙂{}\\$\n", max_size=8)
fillers = st.text(" .*$-\n🙂", max_size=4)


class Writer:
    """Writes a completion and keeps the reading it must get, by the rules and not by regular expressions."""

    def __init__(self, num_problems):
        self.num_problems = num_problems
        self.text, self.marks, self.answers = "", [], [None] * num_problems
        self.answered = set()  # indices of the marks whose segment holds an answer that counts
        self.section, self.pending = None, None

    def say(self, text):
        if any(letter.isalnum() or letter in "_\\" for letter in text):
            self.pending = None  # something follows the answer
        self.text += text

    def settle(self):
        if self.pending is not None:
            self.answers[self.pending[0]] = self.pending[1]
            self.answered.add(len(self.marks) - 1)
        self.pending = None

    def mark(self, problem):
        self.marks.append((len(self.text), problem))
        self.section = problem

    def heading(self, number, hashes):
        if self.text and not self.text.endswith("\n"):
            self.text += "\n"
        if number > self.num_problems:
            self.say(f"{hashes} Problem {number}\n")
            return
        self.settle()
        self.mark(number - 1)
        self.text += f"{hashes} Problem {number}\n"

    def answer(self, number, content, dollar):
        if number > self.num_problems:
            self.say(f"Answer {number}: \\boxed{{0}}")
            return
        self.settle()
        if number - 1 != self.section:
            self.mark(number - 1)
        self.text += f"Answer {number}: {dollar}\\boxed{{{content}}}{dollar}"
        self.pending = (number - 1, content.strip())

    def cut_off_answer(self, number):
        self.settle()
        if number - 1 != self.section:
            self.mark(number - 1)
        self.text += f"Answer {number}: \\boxed{{{{1}} + a"


@st.composite
def markdown_completions(draw):
    num_problems, finish = draw(st.integers(1, 4)), draw(finishes)
    writer = Writer(num_problems)
    numbers = st.integers(1, 5)
    for kind in draw(st.lists(st.sampled_from(["heading", "answer", "answer", "reasoning", "filler", "section"]), max_size=9)):
        if kind in ("heading", "section"):
            number = draw(numbers)
            writer.heading(number, draw(st.sampled_from(["##", "###", "####"])))
        if kind in ("reasoning", "section"):
            writer.say(draw(reasoning))
        if kind in ("answer", "section"):
            writer.answer(number if kind == "section" else draw(numbers), draw(contents), draw(st.sampled_from(["", "$"])))
        if kind in ("filler", "section"):
            writer.say(draw(fillers))
    if draw(st.integers(0, 4)) == 0:
        writer.cut_off_answer(draw(st.integers(1, num_problems)))
    if finish == "stop":
        writer.settle()
    return writer, finish


@settings(calm, max_examples=400)
@given(markdown_completions())
def test_markdown_built_from_parts_is_read_as_built(completion):
    writer, finish = completion
    marks, answers = read_markdown(writer.text, finish, writer.num_problems)
    assert answers == tuple(writer.answers)
    assert marks == [Mark(*mark, answered=index in writer.answered) for index, mark in enumerate(writer.marks)]


@settings(calm, max_examples=200)
@given(markdown_completions(), st.sampled_from(["bytes", "merging"]))
def test_segments_begin_at_the_token_that_holds_the_marker(completion, name):
    """The tokenizer's own offsets say which token that is; of two markers in one token the later one has it."""
    writer, finish = completion
    encoding = TOKENIZERS[name].encode(writer.text)
    ids = [*encoding.ids, EOS] if finish == "stop" else encoding.ids
    marks = {}
    for character, problem in writer.marks:
        marks[next(token for token, (start, stop) in enumerate(encoding.offsets) if start <= character < stop)] = problem
    reading = dialect_of(TOKENIZERS[name]).read(ids, finish, writer.num_problems)
    assert reading.answers == tuple(writer.answers)
    assert owners(reading.segments) == owners_by_marks(sorted(marks.items()), len(ids))
    assert len(reading.segments) == (max(1, len(marks)) if ids else 0)


@calm
@given(st.permutations(range(3)), st.lists(plain, min_size=3, max_size=3), st.integers(0, 10_000), st.sampled_from(["bytes", "merging"]))
def test_a_cut_off_completion_keeps_the_answers_that_a_marker_follows(order, said, cut, name):
    writer, seen = Writer(3), []
    for problem in order:
        writer.heading(problem + 1, "###")
        seen.append((problem, len(writer.text) - 1))  # the heading is whole before its line ends
        writer.say("1 + é\n")
        writer.answer(problem + 1, said[problem], "")
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(writer.text).ids
    whole = dialect_of(tokenizer).read([*ids, EOS], "stop", 3)
    assert whole.answers == tuple(content.strip() for content in said)

    kept = ids[: cut % (len(ids) + 1)]
    length = len(tokenizer.decode(kept, skip_special_tokens=False).rstrip("\ufffd"))
    reached = [problem for problem, end in seen if end <= length]
    counted = {problem: said[problem].strip() for problem in reached[:-1]}
    reading = dialect_of(tokenizer).read(kept, "length", 3)
    assert reading.answers == tuple(counted.get(problem) for problem in range(3))
    assert [segment.problem for segment in reading.segments] == (reached or [0] * bool(kept))


@pytest.mark.parametrize(
    ("text", "finish", "problems", "answers"),
    [
        ("### Problem 1\n1+1\nAnswer 1: \\boxed{2}\n### Problem 2\nAnswer 2: \\boxed{5}\n", "stop", [0, 1], ("2", "5")),
        ("### Problem 2\nAnswer 2: \\boxed{5}\n### Problem 1\nAnswer 1: \\boxed{2}", "stop", [1, 0], ("2", "5")),
        ("### Problem 1\nAnswer 1: \\boxed{2}\n### Problem 2\nAnswer 2: \\boxed{5}", "length", [0, 1], ("2", None)),
        ("Answer 1: \\boxed{2}\nAnswer 2: \\boxed{5}", "stop", [0, 1], ("2", "5")),  # no headings at all
        ("### Problem 1\nAnswer 2: \\boxed{5}\nAnswer 1: \\boxed{2}", "stop", [0, 1, 0], ("2", "5")),
        ("### Problem 1\nAnswer 1: \\boxed{2}. But wait.\n### Problem 2\n", "stop", [0, 1], (None, None)),  # something follows
        ("### Problem 1\nAnswer 1: \\boxed{2} \\quad\n### Problem 2\n", "stop", [0, 1], (None, None)),
        ("### Problem 1\n**Answer 1: $\\boxed{2}$**.\n\n---\n\n## Problem 2\n", "stop", [0, 1], ("2", None)),  # fillers do not
        ("Answer 1: \\boxed{2}\nAnswer 1: \\boxed{3}\n", "stop", [0], ("3", None)),  # the last one counts ...
        ("Answer 1: \\boxed{2}\nAnswer 1: \\boxed{3} or so", "stop", [0], ("2", None)),  # ... that keeps the format
        ("Answer 1: \\boxed{2}\n### Problem 3\n### Problem 2\n", "stop", [0, 1], (None, None)),  # nobody asked for a third
        ("Answer 1: \\boxed{2}\nAnswer 0: \\boxed{3}", "stop", [0], (None, None)),
        ("Answer 1: \\boxed{\\frac{1}{2}}", "stop", [0], ("\\frac{1}{2}", None)),
        ("Answer 1: \\boxed{\\{1, 2\\}}", "stop", [0], ("\\{1, 2\\}", None)),
        ("Answer 1: \\boxed{Answer 2: \\boxed{5}}", "stop", [0], ("Answer 2: \\boxed{5}", None)),  # inside a box nothing is marked
        ("Answer 1: \\boxed{a\n### Problem 2\nb}", "stop", [0], ("a\n### Problem 2\nb", None)),
        ("Answer 1: \\boxed{{5}\nAnswer 2: \\boxed{5}", "stop", [0, 1], (None, "5")),  # a box that never closes
        ("Answer 1: \\boxed{Answer 2: \\boxed{5}\n### Problem 1\n", "stop", [0, 1, 0], (None, "5")),  # ... has nothing inside
        ("Answer 1: \\boxed{}", "stop", [0], ("", None)),
        ("**Answer 1:** \\boxed{5}\n\n**Answer 2**: $\\boxed{7}$\n", "stop", [0, 1], ("5", "7")),  # bold that closes before the box
        ("Answer 1: **\\boxed{5}**\nAnswer2::\\boxed{7}", "stop", [0, 1], ("5", "7")),  # the paper writes two colons
        ("Answer 1: \\(\\boxed{5}\\)\nAnswer 2: \\[ \\boxed {7} \\]", "stop", [0, 1], ("5", "7")),
        ("Answer 1: so \\boxed{5}", "stop", [], (None, None)),
        ("Answer 1: 5", "stop", [], (None, None)),
        ("as in ### Problem 2 above\n##### Problem 2\n### Problem 2a\n", "stop", [], (None, None)),  # no headings
        ("", "stop", [], (None, None)),
    ],
)
def test_markdown_by_hand(text, finish, problems, answers):
    marks, found = read_markdown(text, finish, 2)
    assert found == answers
    assert [mark.problem for mark in marks] == problems


def test_numbers_of_two_digits_are_read_whole():
    text = "### Problem 1\nAnswer 1: \\boxed{1}\n### Problem 12\nAnswer 12: \\boxed{2}"
    marks, answers = read_markdown(text, "stop", 12)
    assert marks == [Mark(0, 0), Mark(34, 11)]
    assert answers == ("1", *[None] * 10, "2")


def test_two_markers_in_one_token():
    """`\\n### Problem 2\\n#### Problem 3\\n` is one token: it belongs to problem 3, and the answer before it counts."""
    ids = MERGING.encode("### Problem 1\nAnswer 1: \\boxed{7}.\n### Problem 2\n#### Problem 3\nAnswer 3: \\boxed{8}").ids
    reading = dialect_of(MERGING).read([*ids, EOS], "stop", 3)
    assert reading.answers == ("7", None, "8")
    assert [segment.problem for segment in reading.segments] == [0, 2]


def test_an_empty_completion_and_a_bare_end():
    assert dialect_of(BYTES).read([], "length", 2) == Reading((None, None), ())
    bare = dialect_of(BYTES).read([EOS], "stop", 2)
    assert bare.answers == (None, None)
    assert owners(bare.segments) == [0]


@calm
@given(contents, st.text("{}\\ab", max_size=5))
def test_the_closing_brace_is_the_matching_one(content, rest):
    assert closing_brace(f"x{{{content}}}{rest}", 2) == 2 + len(content)
    assert closing_brace(f"x{{{content}", 2) is None


def test_the_markdown_prompt_asks_for_everything():
    problems = [Problem(str(k), question, "0", "test") for k, question in enumerate(("What is 1 + 1?", "What is é?"))]
    text = BYTES.decode(dialect_of(BYTES).prompt_ids(problems))
    assert "following 2 problems" in text
    assert "### Problem 1\nWhat is 1 + 1?\n\n### Problem 2\nWhat is é?" in text
    assert "Answer k: \\boxed{...}" in text


def test_markdown_checks_are_counted():
    text = "Wait, let me check. Let me re-check, or double-check. Let me verify this await."
    assert dialect_of(BYTES).count_checks(BYTES.encode(text).ids) == 5
