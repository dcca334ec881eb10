"""The embedded world: right answers, disjoint splits, problems that are pure functions of their index, and a teacher as described."""

import random
import zlib
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from bcr.tasks.arithmetic import MARKERS, MODULUS, VOCABULARY, ArithmeticProblems, build_tokenizer, is_held_out, solve, steps_of, teach

calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

operations = st.tuples(st.sampled_from("+-*"), st.integers(0, MODULUS - 1))
questions = st.builds(
    lambda start, steps: " ".join([str(start), *(f"{operator} {operand}" for operator, operand in steps)]),
    st.integers(0, MODULUS - 1),
    st.lists(operations, min_size=1, max_size=6),
)
seeds = st.integers(0, 2**32)


# ---- problems ------------------------------------------------------------------------------------------------------------------


def by_python(question):
    """The question with its operations bracketed from the left, in whole numbers, reduced once at the end."""
    start, *rest = question.split()
    text = start
    for operator, operand in zip(rest[::2], rest[1::2], strict=True):
        text = f"({text} {operator} {operand})"
    return eval(text) % MODULUS


@pytest.mark.parametrize(
    ("question", "answer"), [("7 + 3 * 5", 11), ("4 - 9 + 2", 10), ("12 * 12", 1), ("0 - 1", 12), ("6 + 7", 0), ("5 * 2 - 10", 0)]
)
def test_answers_by_hand(question, answer):
    assert solve(question) == answer


@calm
@given(questions)
def test_answers_agree_with_pythons_own_arithmetic(question):
    assert solve(question) == by_python(question)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_problems_are_as_described(split):
    problems = [ArithmeticProblems(split, seed=5)[index] for index in range(300)]
    for problem in problems:
        start, steps = steps_of(problem.question)
        assert 0 <= start < MODULUS
        assert all(operator in "+-*" and 2 <= operand < MODULUS for operator, operand in steps)
        assert problem.answer == str(by_python(problem.question))
        assert problem.difficulty == len(steps)
        assert problem.source == "arithmetic"
    assert len({problem.id for problem in problems}) == 300
    lengths = Counter(problem.difficulty for problem in problems)
    assert set(lengths) == {2.0, 3.0, 4.0}
    assert min(lengths.values()) > 60


def test_held_out_and_train_are_disjoint_by_hash():
    for seed in (0, 1):
        for index in range(200):
            train, held_out = ArithmeticProblems("train", seed)[index], ArithmeticProblems("heldout", seed)[index]
            assert zlib.crc32(train.question.encode()) % 10 != 0
            assert zlib.crc32(held_out.question.encode()) % 10 == 0
            assert not is_held_out(train.question)
            assert is_held_out(held_out.question)


def test_one_problem_in_ten_is_held_out():
    every = [f"{a} {f} {b} {g} {c}" for a in range(13) for f in "+-*" for b in range(2, 13) for g in "+-*" for c in range(2, 13)]
    assert sum(map(is_held_out, every)) / len(every) == pytest.approx(0.1, abs=0.01)


@calm
@given(st.integers(0, 10**9), seeds, st.sampled_from(["train", "heldout"]))
def test_a_problem_is_a_pure_function_of_its_index(index, seed, split):
    first = ArithmeticProblems(split, seed)
    wanted = first[index]
    random.seed(index)  # the global generator is neither read ...
    second = ArithmeticProblems(split, seed)
    _ = [second[other] for other in (3, index + 1, 0)]  # ... nor does it matter what was asked before
    assert second[index] == wanted == first[index]


def test_index_seed_and_split_all_matter():
    asked = {ArithmeticProblems(split, seed)[index].question for split in ("train", "heldout") for seed in range(4) for index in range(40)}
    assert len(asked) > 300


TRAIN_0 = ["6 - 5 + 5 - 9", "3 - 11 * 6", "0 - 4 + 8 + 2 + 4"]
HELD_OUT_0 = ["8 - 3 + 6 - 8", "1 * 6 - 4 * 2 * 9", "1 - 3 * 4"]


def test_the_problems_stay_the_same_for_ever():
    """A checkpoint's cursor, and a published figure, mean these problems."""
    assert [ArithmeticProblems("train", 0)[index].question for index in range(3)] == TRAIN_0
    assert [ArithmeticProblems("heldout", 0)[index].question for index in range(3)] == HELD_OUT_0


def test_operations_can_be_chosen():
    problems = ArithmeticProblems("train", 0, operations=[1, 6])
    assert {problems[index].difficulty for index in range(40)} == {1.0, 6.0}
    for wrong in ([], [0], [2, -1]):
        with pytest.raises(ValueError, match=r"data\.operations is \["):
            ArithmeticProblems("train", 0, operations=wrong)


# ---- the teacher ---------------------------------------------------------------------------------------------------------------


def passes_of(words):
    """A chain of thought taken apart: [(left, operator, operand, result), ...] of every pass, and the answer it ends with."""
    assert words[-3] == "so"
    assert words[-1] == "."
    body, passes = words[:-3], []
    while body:
        if passes:
            assert body[:2] == ["wait", "check"]
            body = body[2:]
        end = body.index("wait") if "wait" in body else len(body)
        assert end % 5 == 0
        steps = [body[at : at + 5] for at in range(0, end, 5)]
        assert all(step[3] == "=" for step in steps)
        passes.append([(int(left), operator, int(operand), int(result)) for left, operator, operand, _, result in steps])
        body = body[end:]
    return passes, int(words[-2])


@calm
@given(questions, seeds, st.sampled_from([0.0, 0.07, 0.4, 1.0]))
def test_every_pass_goes_over_the_whole_problem(question, seed, slip):
    """Each pass has the problem's steps in order and goes on from its own results; a slip is off by one and nothing else."""
    start, steps = steps_of(question)
    passes, _ = passes_of(teach(question, random.Random(seed), slip=slip, direct=0.0))
    assert 1 <= len(passes) <= 5
    for one in passes:
        assert [(operator, operand) for _, operator, operand, _ in one] == steps
        assert [left for left, *_ in one] == [start, *(result for *_, result in one[:-1])]
        off = {(result - by_python(f"{left} {operator} {operand}")) % MODULUS for left, operator, operand, result in one}
        assert off <= ({0} if slip == 0 else {1, MODULUS - 1} if slip == 1 else {0, 1, MODULUS - 1})


@calm
@given(questions, seeds, st.sampled_from([0.0, 0.07, 0.4]))
def test_the_answer_is_what_most_passes_found_and_of_equals_the_latest(question, seed, slip):
    passes, answer = passes_of(teach(question, random.Random(seed), slip=slip, direct=0.0))
    results = [one[-1][-1] for one in passes]
    most = max(results.count(result) for result in results)
    assert answer == next(result for result in reversed(results) if results.count(result) == most)
    if slip == 0:
        assert answer == by_python(question)


@calm
@given(questions, seeds)
def test_a_direct_answer_is_right_and_nothing_else(question, seed):
    assert teach(question, random.Random(seed), direct=1.0) == ["so", str(by_python(question)), "."]


@calm
@given(questions, seeds)
def test_its_words_are_in_the_vocabulary_and_no_markers(question, seed):
    words = teach(question, random.Random(seed))
    assert set(words) <= set(VOCABULARY) - set(MARKERS)
    assert words == teach(question, random.Random(seed))


def test_the_shares_are_those_asked_for():
    """Within five standard errors: 5 % direct answers, 7 % slips, and as many passes for an easy problem as for a hard one."""
    rng = random.Random(0)
    for question in ("7 + 3 * 5", "12 - 4 * 9 + 2 * 2"):
        lessons = [teach(question, rng) for _ in range(4000)]
        reasoned = [passes_of(words) for words in lessons if len(words) > 3]
        assert 1 - len(reasoned) / 4000 == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / 4000) ** 0.5)
        steps = [step for passes, _ in reasoned for one in passes for step in one]
        slips = sum(result != by_python(f"{left} {operator} {operand}") for left, operator, operand, result in steps)
        assert slips / len(steps) == pytest.approx(0.07, abs=5 * (0.07 * 0.93 / len(steps)) ** 0.5)
        for count, seen in Counter(len(passes) for passes, _ in reasoned).items():
            assert 1 <= count <= 5
            assert seen / len(reasoned) == pytest.approx(0.2, abs=5 * (0.2 * 0.8 / len(reasoned)) ** 0.5)


def test_wrong_answers_are_kept_and_checking_helps():
    rng = random.Random(1)
    lessons = [passes_of(teach("12 - 4 * 9 + 2 * 2", rng, direct=0.0)) for _ in range(3000)]
    right = {count: [answer == 5 for passes, answer in lessons if len(passes) == count] for count in range(1, 6)}
    assert by_python("12 - 4 * 9 + 2 * 2") == 5
    share = {count: sum(answers) / len(answers) for count, answers in right.items()}
    assert 0.6 < share[1] < 0.9  # 0.93 ** 4 = 0.75: wrong answers stay in
    assert share[5] > share[3] > share[1] + 0.05
    assert share[5] < 1


# ---- the tokenizer -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build_tokenizer().save(str(file))
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def test_it_loads_as_a_hugging_face_fast_tokenizer(fast):
    assert fast.is_fast
    assert len(fast) == len(VOCABULARY) == len(set(VOCABULARY))
    assert (fast.pad_token_id, fast.bos_token_id, fast.eos_token_id) == (0, 1, 2)
    assert fast.all_special_tokens
    assert fast.convert_ids_to_tokens(list(range(len(VOCABULARY)))) == VOCABULARY


def test_text_makes_the_round_trip(fast):
    @calm
    @given(st.lists(st.sampled_from(VOCABULARY), max_size=30))
    def round_trip(words):
        text = " ".join(words)
        ids = fast(text, add_special_tokens=False)["input_ids"]
        assert ids == [VOCABULARY.index(word) for word in words]
        assert fast.decode(ids) == text
        spoken = [word for word in words if word not in ("<pad>", "<bos>", "<eos>")]
        assert fast.decode(ids, skip_special_tokens=True) == " ".join(spoken)

    round_trip()


def test_a_whole_problem_is_one_token_a_word(fast):
    text = "<bos> Q1 7 + 3 * 5 go Q1 7 + 3 = 10 10 * 5 = 11 so 11 . <eos>"
    assert fast.tokenize(text) == text.split()
