"""Problems from a file: what is read, the one sentence for each defect, and epochs in an order that depends on nothing but the cursor."""

import json
import re

import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcr.records import Problem
from bcr.tasks.arithmetic import ArithmeticDialect, ArithmeticProblems, build_tokenizer
from bcr.tasks.bundles import Budget, BundleStream
from bcr.tasks.problems import Columns, ShuffledProblems, read_file, read_hub

calm = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def write(tmp_path):
    def written(rows, name="sums.jsonl"):
        file = tmp_path / name
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
        return file

    return written


def row(number, **more):
    return {"problem": f"What is {number} + {number}?", "answer": str(2 * number), **more}


def message(path, **columns):
    with pytest.raises(ValueError, match=re.escape(str(path))) as refusal:
        read_file(path, Columns(**columns))
    return str(refusal.value)


# ---- what is read --------------------------------------------------------------------------------------------------------------


def test_columns_that_are_there_are_used_and_others_are_filled_in(write):
    path = write([row(1), row(2, id="two", source="book", difficulty=3, hint="none")])
    assert read_file(path) == [
        Problem("sums/1", "What is 1 + 1?", "2", "sums", None),
        Problem("two", "What is 2 + 2?", "4", "book", 3.0),
    ]


def test_columns_can_be_named(write):
    path = write([{"q": "1 + 1", "gold": 2, "problem": "not this", "answer": "nor this"}])
    (problem,) = read_file(path, Columns(question="q", answer="gold"))
    assert (problem.question, problem.answer) == ("1 + 1", "2")


def test_blank_lines_are_passed_over_and_text_is_utf8(write):
    path = write(["", row(1, problem="Wieviel ist 1 + 1, bitte schön? 漢🙂"), "   ", row(2)])
    first, second = read_file(path)
    assert first.question == "Wieviel ist 1 + 1, bitte schön? 漢🙂"
    assert (first.id, second.id) == ("sums/2", "sums/4")  # the line in the file, to be found again


def test_an_answer_of_zero_is_an_answer(write):
    assert read_file(write([row(0, answer=0)]))[0].answer == "0"


# ---- what is refused -----------------------------------------------------------------------------------------------------------


def test_row_17_lacks_the_answer(write):
    rows = [row(number) for number in range(1, 31)]
    del rows[16]["answer"]
    path = write(rows)
    assert message(path) == f"{path}: row 17 lacks 'answer'."


@pytest.mark.parametrize("value", ["", None])
def test_an_empty_column_is_a_missing_one(write, value):
    path = write([row(1), row(2, problem=value)])
    assert message(path) == f"{path}: row 2 lacks 'problem'."


def test_the_named_column_is_the_one_that_is_missed(write):
    path = write([row(1)])
    assert message(path, answer="gold") == f"{path}: row 1 lacks 'gold'."


def test_a_row_that_is_no_json(write):
    path = write([row(1), '{"problem": "cut off', row(3)])
    assert message(path).startswith(f"{path}: row 2 is not valid JSON (")


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "7", "null"])
def test_a_row_that_is_no_object(write, line):
    path = write([row(1), line])
    assert message(path) == f"{path}: row 2 is not a JSON object."


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "none.jsonl"
    assert message(path) == f"data.path is {str(path)!r}: there is no such file."
    assert message(tmp_path) == f"data.path is {str(tmp_path)!r}: there is no such file."


@pytest.mark.parametrize("rows", [[], ["", "  "]])
def test_a_file_without_problems(write, rows):
    path = write(rows)
    assert message(path) == f"{path}: the file holds no problems."


def test_a_file_that_is_no_utf8(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(row(1)).encode() + b'\n{"problem": "sch\xf6n", "answer": "1"}\n')
    assert message(path) == f"{path}: row 2 is not UTF-8 text."


@pytest.mark.parametrize("value", ["hard", "Level 3", True, [1], float("nan"), float("inf"), ""])
def test_a_difficulty_that_is_no_number(write, value):
    path = write([row(1), row(2, difficulty=value)])
    shown = repr(value)
    assert message(path) == f"{path}: row 2 has the difficulty {shown}; it must be a number, or left out."


def test_a_difficulty_may_be_written_as_text(write):
    rows = [row(1, level="3.5"), row(2, level=None), row(3)]
    assert [problem.difficulty for problem in read_file(write(rows), Columns(difficulty="level"))] == [3.5, None, None]


def test_a_question_that_is_no_text(write):
    path = write([row(1, problem=[{"role": "user", "content": "1 + 1?"}])])
    assert message(path) == f"{path}: row 1 has a 'problem' that is no text."


# ---- formats and forms ---------------------------------------------------------------------------------------------------------

TABLE = [
    {"question": "What is 1 + 1?", "final": "2", "difficulty": 1.5},
    {"question": 'Was, bitte, ist "2",\n漢?', "final": "\\frac{1}{2}", "difficulty": 4.0},
]


def written_by_pandas(frame, path):
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=path.suffix == ".jsonl")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_problems(tmp_path, suffix):
    path = tmp_path / f"book{suffix}"
    written_by_pandas(pandas.DataFrame(TABLE), path)
    assert read_file(path, Columns(question="question", answer="final")) == [
        Problem("book/1", TABLE[0]["question"], "2", "book", 1.5),
        Problem("book/2", TABLE[1]["question"], "\\frac{1}{2}", "book", 4.0),
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_that_lacks_a_column_or_is_damaged(tmp_path, suffix):
    path = tmp_path / f"book{suffix}"
    written_by_pandas(pandas.DataFrame(TABLE), path)
    assert message(path, question="question") == f"{path}: row 1 lacks 'answer'."
    path.write_bytes(b"PAR1\x00\xff\xfe")
    assert message(path).startswith(f"{path}: ")


def test_solutions_give_their_answers(write):
    boxed = write([row(1, answer="So \\boxed{1}. No: \\boxed{\\frac{1}{2}}.")], "boxed.jsonl")
    assert read_file(boxed, Columns(answer_form="boxed"))[0].answer == "\\frac{1}{2}"
    hashes = write([row(1, answer="2 + 2 = <<2+2=4>>4\n#### 1,234")], "hashes.jsonl")
    assert read_file(hashes, Columns(answer_form="hashes"))[0].answer == "1,234"
    several = write([row(1, answer=["2", "-2"])], "several.jsonl")
    assert read_file(several)[0].answer == "2, -2"
    assert message(hashes, answer_form="boxed") == f"{hashes}: row 1 holds no answer in 'answer' (data.answer_form=boxed)."
    with pytest.raises(ValueError, match=r"data\.answer_form is 'tex'; it must be one of plain, boxed, hashes\."):
        Columns(answer_form="tex")


def test_the_hub_is_asked_by_name(monkeypatch):
    asked = {}

    def load_dataset(repo, **options):
        asked.update(options, repo=repo)
        return iter([{"question": "What is 2 + 2?", "answer": "#### 4"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = read_hub("openai/gsm8k", "main", "test", Columns(question="question", answer_form="hashes"))
    assert found == [Problem("gsm8k/1", "What is 2 + 2?", "4", "gsm8k", None)]
    assert asked == {"repo": "openai/gsm8k", "name": "main", "split": "test", "streaming": True}


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach\n'openai/gsm8k' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"^data\.hub is 'openai/gsm8k': the hub did not give it \(Couldn't reach .* data\.path\.$"):
        read_hub("openai/gsm8k", "main", "test")


# ---- epochs --------------------------------------------------------------------------------------------------------------------


def numbered(count):
    return [Problem(str(number), f"{number}?", str(number), "test") for number in range(count)]


@calm
@given(st.integers(1, 40), st.integers(0, 2**32), st.integers(0, 5))
def test_every_epoch_is_a_permutation(count, seed, epoch):
    problems = numbered(count)
    source = ShuffledProblems(problems, seed)
    asked = [source[epoch * count + place] for place in range(count)]
    assert sorted(asked, key=lambda problem: int(problem.id)) == problems


@calm
@given(st.integers(1, 12), st.integers(0, 100), st.lists(st.integers(0, 60), max_size=20))
def test_a_problem_is_a_pure_function_of_the_cursor(count, seed, asked):
    """Whatever was asked before, in whatever order of epochs."""
    wanted = [ShuffledProblems(numbered(count), seed)[index] for index in asked]
    source = ShuffledProblems(numbered(count), seed)
    assert [source[index] for index in asked] == wanted


def test_epochs_and_seeds_differ():
    orders = {
        tuple(ShuffledProblems(numbered(30), seed)[epoch * 30 + place].id for place in range(30)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9
    assert tuple(str(number) for number in range(30)) not in orders


def test_the_list_itself_is_left_alone():
    problems = numbered(9)
    assert ShuffledProblems(problems, 3)[5] in problems
    assert problems == numbered(9)


@calm
@given(st.integers(0, 9), st.integers(0, 9))
def test_bundles_over_a_file_go_on_from_their_state_across_epochs(before, after):
    dialect, problems = ArithmeticDialect(build_tokenizer()), [ArithmeticProblems("train")[index] for index in range(7)]

    def stream():
        return BundleStream(ShuffledProblems(problems, 1), dialect, {1: 1.0, 3: 1.0}, Budget(total=60), 1)

    whole, first, second = stream(), stream(), stream()
    taken = first.take(before)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert taken + second.take(after) == whole.take(before + after)
