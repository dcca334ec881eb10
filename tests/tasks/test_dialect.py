"""How completions are read, in both dialects: segments partition them whatever they hold, and an answer counts only as the format asks.

Token soup must never fail. For completions built from parts the right reading is known beforehand: parts are well-formed answers,
answers followed by something, missing ones, repeated ones, markers beyond N, markers and braces nested in a box, cut-off ends.
"""

import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from bcr.records import Problem
from bcr.tasks.arithmetic import MARKERS, VOCABULARY, ArithmeticDialect, build_tokenizer, marked_answer, teach
from bcr.tasks.dialect import Mark, Reading, partition, spell
from bcr.tasks.markdown import closing_brace, read_markdown
from bcr.tasks.text import TextDialect

calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

finishes = st.sampled_from(["stop", "length"])


def owners(segments):
    """The problem of every token, after checking that the segments lie end to end from 0 on and none is empty."""
    spread, expected_start = [], 0
    for segment in segments:
        assert segment.start == expected_start < segment.stop
        spread += [segment.problem] * (segment.stop - segment.start)
        expected_start = segment.stop
    return spread


def owners_by_marks(marks, length):
    """The same from (token, problem) marks: a token belongs to the last mark at or before it, early ones to the first mark."""
    first = marks[0][1] if marks else 0
    return [next((problem for place, problem in reversed(marks) if place <= token), first) for token in range(length)]


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


# ---- the embedded world --------------------------------------------------------------------------------------------------------

WORDS = ArithmeticDialect(build_tokenizer())
NUMBERS = [str(number) for number in range(13)]
WORK = ["+", "-", "*", "=", "wait", "check", "3", "12", "so", ".", "go", "<pad>", "<bos>"]


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


# ---- markdown: tokenizers ------------------------------------------------------------------------------------------------------

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer():
    """Every byte is a token: markers and characters are all split."""
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(["<eos>", *ALPHABET])}, []))
    return as_byte_level(tokenizer)


def as_byte_level(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def merging_tokenizer():
    """Byte-level BPE with tokens that end inside a marker, that hold the end of an answer and a marker, and that hold two markers."""
    tokenizer = as_byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(
        ["### Problem 1\n漢 é 🙂 1 + a\nAnswer 1: \\boxed{1}\n\n## Problem 2\nAnswer 2: $\\boxed{a}$"] * 3, trainer
    )
    wide = [
        "}\n### Pro",
        "a\n### Problem 1",
        "\n### Problem 2\n#### Problem 3\n",
        "Answer 2: \\boxed{1}Answer 1: \\boxed{",
        "1}",
        "lem 2\n漢",
    ]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in wide])
    return tokenizer


def fallback_tokenizer():
    """Characters, and bytes where a character is missing (SentencePiece): bytes that are no UTF-8 change what stood before them."""
    characters = ["\n", *"#Problem123Answer4:\\boxd{} .+=", "▁"]
    vocabulary = {
        piece: index for index, piece in enumerate(dict.fromkeys(["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]))
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<eos>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def byte_letters():
    """The letter that stands for each byte in a byte-level vocabulary: printable bytes for themselves, the others from 256 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + place) for place, byte in enumerate(others)}}


BYTE_LETTERS = byte_letters()
BYTES, MERGING, FALLBACK = byte_tokenizer(), merging_tokenizer(), fallback_tokenizer()
TOKENIZERS = {"bytes": BYTES, "merging": MERGING, "fallback": FALLBACK}
EOS = 0


def dialect_of(tokenizer):
    return TextDialect(tokenizer, [EOS])


@st.composite
def soups(draw):
    """(tokenizer, ids): anything at all, mixed with pieces of markers so that some of it is read."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    tokenizer = TOKENIZERS[name]
    anything = st.lists(st.integers(0, tokenizer.get_vocab_size() + 5), max_size=4)
    pieces = ["\n### Problem ", "1", "2", "\n", "Answer 1: \\boxed{", "Answer 2: \\boxed{", "}", "{", "\\", "é", "漢", "🙂", " x"]
    known = st.sampled_from([tokenizer.encode(piece).ids for piece in pieces])
    parts = draw(st.lists(st.one_of(anything, known), max_size=15))
    return name, [token for part in parts for token in part]


@settings(calm, max_examples=300)
@given(soups(), finishes, st.integers(1, 3))
@example(("fallback", [ord("y") + 1, 257, ord("y") + 1, 0xE3 + 1, 257]), "length", 2)
def test_any_tokens_are_read_and_partitioned(soup, finish, num_problems):
    name, ids = soup
    reading = dialect_of(TOKENIZERS[name]).read(ids, finish, num_problems)
    assert len(owners(reading.segments)) == len(ids)
    assert {segment.problem for segment in reading.segments} <= set(range(num_problems))
    assert len(reading.answers) == num_problems


@settings(calm, max_examples=300)
@given(soups())
def test_spelling_places_every_token(soup):
    """The text is the tokenizer's own, up to tokens at the end whose bytes are no character yet, and every token has its place in it."""
    name, ids = soup
    text, starts = spell(TOKENIZERS[name], ids)
    assert len(starts) == len(ids)
    assert starts == sorted(starts)
    assert all(0 <= start <= len(text) for start in starts)
    if name != "fallback":
        whole = TOKENIZERS[name].decode(ids, skip_special_tokens=False)
        assert whole.startswith(text)
        assert whole == text or whole.endswith("\ufffd")


@calm
@given(st.lists(st.one_of(st.binary(min_size=30, max_size=90), st.text("a漢🙂é", max_size=9).map(str.encode)), max_size=6))
def test_long_runs_of_broken_bytes_are_spelled_as_the_tokenizer_does(parts):
    """However long a run without a whole character is, the text is the same; what the decoder holds back of it stays short."""
    ids = [BYTES.token_to_id(BYTE_LETTERS[byte]) for byte in b"".join(parts)]
    text, starts = spell(BYTES, ids)
    whole = BYTES.decode(ids, skip_special_tokens=False)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}
    assert len(whole) - len(text) <= 40
    assert len(starts) == len(ids)


def test_a_character_begins_with_the_token_that_completes_it():
    ids = BYTES.encode("a漢b").ids
    assert len(ids) == 5
    assert spell(BYTES, ids) == ("a漢b", [0, 1, 1, 1, 2])
    assert spell(BYTES, ids[:3]) == ("a", [0, 1, 1])


def test_a_marker_is_found_after_bytes_that_are_no_text():
    """A lone first byte after characters that were bytes themselves: the decoder takes back what it had said, and the reading goes on."""
    tokenizer, broken = FALLBACK, [ord("y") + 1, 257, ord("y") + 1, 0xE3 + 1]
    heading = [tokenizer.token_to_id(letter) for letter in "\n###▁Problem▁2\n"]
    reading = dialect_of(tokenizer).read([*broken, *heading], "length", 2)
    assert {segment.problem for segment in reading.segments} == {1}


# ---- markdown: completions built from parts ------------------------------------------------------------------------------------

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


# ---- markdown: by hand ---------------------------------------------------------------------------------------------------------


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
