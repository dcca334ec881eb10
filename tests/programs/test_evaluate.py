"""Evaluation: a table and a JSON file, the same problems at every N, the same result twice."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from bcr.analysis.cell import scaling_laws
from bcr.evaluate import evaluate, prepare, table
from bcr.runtime.config import compose
from bcr.runtime.schema import EvaluateConfig

FEW = ["device=cpu", "problems=24", "sizes=[1,3]", "budgets=[110]", "budgets_per_problem=[130]", "sampling.row_block=8"]


def cells_of(*overrides: str) -> list[dict]:
    return evaluate(prepare(compose("evaluate", [*FEW, *overrides], EvaluateConfig)))


def test_every_cell_counts_every_problem_and_repeats_exactly():
    cells = cells_of("problems=9")
    assert [(cell["n"], cell["budget"], cell["budget_per_problem"]) for cell in cells] == [
        (1, 110, None),
        (3, 110, None),
        (1, None, 130),
        (3, None, 130),
    ]
    assert all(cell["problems"] == 9 for cell in cells)
    assert cells == cells_of("problems=9", "sampling.max_batch=8")


def test_a_tight_shared_budget_costs_more_where_more_share_it():
    one, three = cells_of("budgets=[60]", "budgets_per_problem=[]", "problems=60")
    assert three["unanswered"] > one["unanswered"] + 0.2
    assert three["accuracy"] < one["accuracy"]


def test_problems_that_do_not_fill_the_last_bundle_are_asked_too():
    (cell,) = cells_of("problems=10", "sizes=[4]", "budgets=[]")
    assert cell["problems"] == 10


def test_several_data_sets_are_measured_one_after_the_other(tmp_path):
    """Files in the columns of data; every cell counts its verdicts, and they add up."""
    for name, count in (("sums", 5), ("more", 3)):
        rows = [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("sums", "more")]
    overrides = ["model=random", f"benchmarks=[{','.join(files)}]", "problems=4", "sizes=[1,3]", "budgets=[6]", "budgets_per_problem=[]"]
    cells = cells_of(*overrides)
    sums, more = files
    assert [(cell["data"], cell["n"], cell["problems"]) for cell in cells] == [(sums, 1, 4), (sums, 3, 4), (more, 1, 3), (more, 3, 3)]
    assert all(sum(cell["verdicts"].values()) == cell["problems"] for cell in cells)
    cyclic = cells_of(*overrides, "cyclic=true", "sampling.max_batch=8")
    assert [cell["problems"] for cell in cyclic] == [4, 12, 3, 9]
    shown = Console(file=io.StringIO(), width=200, record=True)
    shown.print(table(cyclic))  # at N = 1 a problem is asked once, so there is no pass@3
    assert [line.split().count("-") for line in shown.export_text().splitlines() if "sums" in line] == [1, 0]
    with pytest.raises(ValueError, match="N = 4, more than there are problems"):
        cells_of(*overrides, "cyclic=true", "sizes=[4]")


def test_a_named_benchmark_has_columns_of_its_own(monkeypatch):
    def load_dataset(repo, **options):
        assert repo == "math-ai/amc23"
        return iter([{"question": "What is 1 + 1?", "answer": 2.0}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (cell,) = cells_of("model=random", "benchmarks=[amc23]", "sizes=[1]", "budgets=[6]", "budgets_per_problem=[]")
    assert (cell["data"], cell["problems"]) == ("amc23", 1)


@pytest.mark.parametrize(
    ("override", "phrase"),
    [
        ("problems=0", "problems is 0"),
        ("samples=0", "samples is 0"),
        ("cut_at=[0]", "cut_at is [0]"),
        ("sizes=[]", "at least one N"),
        ("sizes=[7]", "N = 7"),
        ("budgets=[2]", "less than one token"),
        ("budgets=[2000]", "context is 1024"),
        ("data.split=test", "data.split is 'test'"),
        ("benchmarks=[nowhere.jsonl]", "there is no such file"),
    ],
)
def test_bad_input_is_one_sentence(override, phrase):
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as refusal:
        prepare(compose("evaluate", [*FEW, override], EvaluateConfig))
    assert phrase in str(refusal.value)


def test_the_program_writes_a_table_and_json(tmp_path):
    arguments = [*FEW, "problems=6", "sizes=[2]", "budgets=[]", f"output={tmp_path / 'deep' / 'result.json'}"]
    done = subprocess.run([sys.executable, "-m", "bcr.evaluate", *arguments], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert result["cells"][0]["n"] == 2
    assert result["config"]["problems"] == 6
    assert f"{result['cells'][0]['accuracy']:.1%}" in done.stdout


def test_a_cell_says_all_that_its_rollouts_tell():
    one, three = cells_of("budgets=[]", "samples=3", "cut_at=[20,60,400]")
    for cell, size in ((one, 1), (three, 3)):
        assert sum(cell["verdicts"].values()) == cell["problems"] == 72
        assert cell["accuracy_interval"][0] <= cell["accuracy"] <= cell["accuracy_interval"][1]
        assert list(cell["pass_at_k"]) == ["2", "3"]
        for k, (low, high) in cell["pass_at_k_interval"].items():
            assert cell["accuracy"] <= low <= cell["pass_at_k"][k] <= high or cell["pass_at_k"][k] == low == high == 1
        assert 0 < cell["with_loops"] <= 1
        assert sum(place["problems"] for place in cell["by_position"].values()) == 72
        assert len(cell["by_position"]) == size
        assert list(cell["by_difficulty"]) == ["2", "3", "4"]
        curve = cell["accuracy_under_budgets"]
        assert curve["20"] <= curve["60"] <= curve["400"] == cell["accuracy"]
        assert curve["20"] < cell["area_under_budgets"] < curve["400"]
        assert cell["loops_per_thousand"] == pytest.approx(1000 * cell["checks_per_problem"] / cell["tokens_per_problem"])  # "wait check"
    (law,) = scaling_laws([one, three])
    assert law["scale"] == pytest.approx(one["tokens_per_problem"])
    assert law["scale"] * 3 ** -law["exponent"] == pytest.approx(three["tokens_per_problem"])
