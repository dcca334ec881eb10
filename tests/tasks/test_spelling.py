"""Tokens become text and text becomes tokens: every token has its place, whatever the tokenizer and however broken the bytes."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from bcr.tasks.dialect import spell
from tests.tasks.reading_cases import BYTE_LETTERS, BYTES, FALLBACK, TOKENIZERS, calm, dialect_of, finishes, owners


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
