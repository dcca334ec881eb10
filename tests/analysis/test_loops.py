"""What counts as a loop, and what does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcr.analysis.loops import CHINESE, ENGLISH, count_loops, repetition


@pytest.mark.parametrize("phrase", [*ENGLISH, *CHINESE])
def test_every_phrase_counts_once(phrase):
    assert count_loops(f"So x = 3. {phrase.capitalize()}, x = 4.") == 1


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("The waiter waited; he awaits the await.", 0),
        ("Check the table: the checks are equal.", 0),
        ("That can’t be right. Wait... WAIT!", 3),
        ("hmm, hold on, let me verify", 3),
        ("答案是不对的吗？等等。", 2),
        ("", 0),
    ],
)
def test_words_that_only_look_alike_do_not(text, loops):
    assert count_loops(text) == loops


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_repetition_is_the_share_of_grams_seen_before(tokens, n):
    seen, again = set(), 0
    grams = [tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]
    for gram in grams:
        again += gram in seen
        seen.add(gram)
    assert repetition(tokens, n) == pytest.approx(again / len(grams) if grams else 0.0)


def test_an_endless_loop_is_nearly_all_repetition():
    assert repetition([5, 6, 7] * 200) > 0.99
    assert repetition(list(range(600))) == 0.0
