"""Answering a file: the order of the file, the N that was asked for or measured, and a cut-off run that ends as if it had not been."""

import json
import subprocess
import sys

import pytest

from bcr import solve
from bcr.runtime.config import compose
from bcr.solve import SolveConfig, largest_within, prepare, run
from bcr.tasks.arithmetic import ArithmeticProblems

FEW = ["device=cpu", "sampling.row_block=8", "sampling.max_batch=8"]


@pytest.fixture
def problems(tmp_path):
    """Seventeen problems; every second one has its answer beside it."""
    heldout = ArithmeticProblems("heldout", 3)
    rows = [{"id": f"p{k}", "problem": heldout[k].question} | ({"answer": heldout[k].answer} if k % 2 else {}) for k in range(17)]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def solved(file, *overrides):
    job = prepare(compose("solve", [f"input={file}", *FEW, *overrides], SolveConfig))
    run(job)
    return job.answers


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_problem_is_answered_in_order(problems, capsys):
    records = read(solved(problems, "n=3"))
    assert [record["id"] for record in records] == [f"p{k}" for k in range(17)]
    heldout = ArithmeticProblems("heldout", 3)
    right = sum(record["answer"] == heldout[k].answer for k, record in enumerate(records))
    assert right >= 9  # the base is right in 85 of 100; chance is 1 in 13
    said = capsys.readouterr().out
    assert "17 problems, 3 to a prompt" in said
    assert f"{sum(record['answer'] is None for record in records)} without an answer" in said


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.6, 0.99, 1.0])
def test_a_cut_off_run_ends_with_the_same_file(problems, cut):
    answers = solved(problems, "n=3", "samples=2")
    whole = answers.read_bytes()
    answers.write_bytes(whole[: int(cut * len(whole))])
    assert solved(problems, "n=3", "samples=2").read_bytes() == whole


def test_answers_are_on_disk_before_the_end(problems, monkeypatch):
    """Stopped in its second round, the run has kept its first."""
    taken = []

    def once(job, n, done, progress):
        for records in original(job, n, done, progress):
            if taken:
                raise KeyboardInterrupt
            taken.extend(records)
            yield records

    original = solve.solve
    monkeypatch.setattr("bcr.solve.solve", once)
    with pytest.raises(KeyboardInterrupt):
        solved(problems, "n=1", "sampling.max_batch=8", "samples=4")
    assert 0 < len(taken) < 17
    assert read(problems.with_suffix(".answers.jsonl")) == taken


def test_progress_is_told_while_a_round_is_under_way(problems):
    job, told = prepare(compose("solve", [f"input={problems}", *FEW, "n=3"], SolveConfig)), []
    with job.grader:
        rounds = solve.solve(job, 3, 0, told.append)
        assert len(next(rounds)) == 17
        assert len(told) > 1
        assert told == sorted(told)
        assert told[-1] == 17


def test_cut_distributions_are_sampled_from(problems):
    """Of one token nothing is left to chance: all samples agree."""
    records = read(solved(problems, "n=3", "samples=3", "sampling.top_k=1"))
    assert all(len(set(record["answers"])) == 1 for record in records)


def test_auto_takes_the_largest_n_within_the_tolerance(problems, capsys):
    answers = solved(problems, "sizes=[1,2,4]", "tolerance=1.0", "calibration_problems=4")
    summary = json.loads(answers.with_suffix(".summary.json").read_text())
    assert summary["n"] == 4
    assert set(summary["measured"]) == {"1", "2", "4"}
    assert "Saved against N = 1" in capsys.readouterr().out
    cells = {1: {"accuracy": 0.9}, 2: {"accuracy": 0.5}, 5: {"accuracy": 0.88}, 6: {"accuracy": 0.87}}
    assert [largest_within(cells, tolerance) for tolerance in (0.0, 0.025, 0.035)] == [1, 5, 6]


def test_going_on_keeps_the_n_that_was_measured(problems, monkeypatch):
    auto = ["sizes=[1,2,4]", "tolerance=1.0", "calibration_problems=4"]
    answers = solved(problems, *auto)
    whole = answers.read_bytes()
    answers.write_bytes(whole[:300])
    monkeypatch.delattr("bcr.solve.measure")
    assert solved(problems, *auto).read_bytes() == whole


def test_another_config_or_input_does_not_go_on(problems):
    solved(problems, "n=3")
    with pytest.raises(ValueError, match="another n, seed"):
        solved(problems, "n=2", "seed=1")
    problems.write_text(problems.read_text().replace("p0", "q0"))
    with pytest.raises(ValueError, match="content of the input"):
        solved(problems, "n=3")
    with pytest.raises(ValueError, match="N = 7"):
        solved(problems, "n=7", "overwrite=true")
    assert read(problems.with_suffix(".answers.jsonl"))[0]["id"] == "p0", "what is refused removes nothing"
    assert read(solved(problems, "n=3", "overwrite=true"))[0]["id"] == "q0"


@pytest.mark.parametrize(
    ("overrides", "rows", "phrase"),
    [
        (["n=0"], None, "n is '0'"),
        (["n=some"], None, "n is 'some'"),
        (["n=7"], None, "N = 7"),
        (["samples=0"], None, "samples is 0"),
        (["tolerance=-1"], None, "tolerance is -1"),
        (["sizes=[2,3]"], None, "N = 1"),
        (["budget=10"], None, "exactly one"),
        (["kind=other"], None, "kind is 'other'"),
        (["question=text"], None, "lacks 'text'"),
        (["kind=text", "n=auto"], '{"problem": "What is 2 + 2?"}', "n is 'auto'"),
        ([], '{"problem": "What is 2 + 2?"}', "no word of the embedded world"),
        ([], "{", "row 1 is not valid JSON"),
        ([], "", "holds no problems"),
    ],
)
def test_bad_input_is_one_sentence(problems, overrides, rows, phrase):
    if rows is not None:
        problems.write_text(rows)
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as refusal:
        prepare(compose("solve", [f"input={problems}", *FEW, *overrides], SolveConfig))
    assert phrase in str(refusal.value)


@pytest.mark.slow
def test_the_file_may_be_the_first_argument(problems):
    command = [sys.executable, "-m", "bcr.solve", str(problems), "n=6", *FEW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=problems.parent)
    assert done.returncode == 0, done.stderr
    assert str(problems.with_suffix(".answers.jsonl")) in done.stdout
    absent = subprocess.run([*command[:3], "absent.jsonl"], capture_output=True, text=True, timeout=200, cwd=problems.parent)
    assert absent.returncode == 2
    assert absent.stderr == "bcr.solve: input is 'absent.jsonl': there is no such file.\n"
