"""Pass rates per problem: what is written can be read again, the easier ones are kept, and benchmark problems are left out."""

import json

import pytest

from bcr.difficulty import prepare, run
from bcr.runtime.config import compose
from bcr.runtime.schema import DifficultyConfig, TrainConfig
from bcr.tasks.problems import read_file
from bcr.train import prepare as prepare_training

FEW = ["device=cpu", "sampling.row_block=8"]


def measured(folder, *overrides):
    run(prepare(compose("difficulty", [f"output={folder}", *FEW, *overrides], DifficultyConfig)))
    return {name: lines(folder / f"{name}.jsonl") for name in ("measured", "easier", "excluded")}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_easier_problems_of_the_embedded_world(tmp_path):
    files = measured(tmp_path / "out", "problems=10", "samples=4", "above=0.6")
    assert len(files["measured"]) == 10
    for record in files["measured"]:
        assert record["pass_rate"] * 4 in range(5)
        assert record["difficulty"] == 1 - record["pass_rate"]
    assert files["easier"] == [record for record in files["measured"] if record["pass_rate"] > 0.6]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["problems"], summary["easier"]) == (10, len(files["easier"]))
    assert sum(summary["problems_by_pass_rate"].values()) == 10
    again = read_file(tmp_path / "out" / "measured.jsonl")
    assert [problem.difficulty for problem in again] == [record["difficulty"] for record in files["measured"]]
    with pytest.raises(ValueError, match="holds an earlier measurement"):
        measured(tmp_path / "out", "problems=1")


def test_cut_distributions_are_sampled_from(tmp_path):
    """Of one token nothing is left to chance: all samples of a problem fare alike."""
    files = measured(tmp_path / "out", "problems=12", "samples=4", "sampling.top_k=1")
    assert {record["pass_rate"] for record in files["measured"]} <= {0.0, 1.0}


@pytest.fixture
def sums(tmp_path):
    """20 problems with difficulties, and a benchmark that holds two of them in another dress."""

    def question(n):
        return f"Ann has {n} apples and {n + 1} pears, and buys {n + 2} plums. How many pieces of fruit does she have then?"

    file, benchmark = tmp_path / "sums.jsonl", tmp_path / "benchmark.jsonl"
    file.write_text(
        "".join(json.dumps({"problem": question(n), "answer": str(3 * n + 3), "id": str(n), "difficulty": n}) + "\n" for n in range(20))
    )
    benchmark.write_text("".join(json.dumps({"problem": question(n).upper(), "answer": "?"}) + "\n" for n in (4, 7)))
    return ["data=jsonl", f"data.path={file}", f"data.exclude=[{benchmark}]", "data.exclude_share=0.9", "model=random"]


def test_benchmark_problems_are_left_out_and_reported(tmp_path, sums, capsys):
    files = measured(tmp_path / "out", *sums, "samples=2", "budget=4")
    assert [overlap["id"] for overlap in files["excluded"]] == ["4", "7"]
    assert {record["id"] for record in files["measured"]} == {str(n) for n in range(20)} - {"4", "7"}
    assert "2 of 20 problems are in" in capsys.readouterr().err
    assert {record["source_difficulty"] for record in files["measured"]} <= set(range(20))


def test_training_leaves_them_out_too_and_arranges_the_rest(tmp_path, sums):
    overrides = [f"output={tmp_path / 'run'}", *FEW, *sums, "bundles.arrangement=stratified", "bundles.count=6", "bundles.budget=9"]
    prepared = prepare_training(compose("train", overrides, TrainConfig))
    assert [overlap["id"] for overlap in lines(tmp_path / "run" / "excluded.jsonl")] == ["4", "7"]
    bundles = prepared.rollouts.bundles.take(6)
    assert len({problem.id for bundle in bundles for problem in bundle.problems}) == 18
    means = [sum(problem.difficulty for problem in bundle.problems) / 3 for bundle in bundles]
    assert max(means) - min(means) < 3


@pytest.mark.parametrize(
    ("overrides", "phrase"),
    [
        (["samples=0"], "samples is 0"),
        (["problems=0"], "problems is 0"),
        (["above=0.9", "up_to=0.5"], "above is 0.9 and up_to 0.5"),
        (["sampling.temperature=0"], "equal samples would measure nothing"),
        (["budget=2000"], "the model's context is 1024"),
        (["data=deepmath", "data.path=nowhere.parquet"], "there is no such file"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, overrides, phrase):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        prepare(compose("difficulty", [f"output={tmp_path / 'never'}", *FEW, *overrides], DifficultyConfig))
    assert phrase in str(refusal.value)
    assert not (tmp_path / "never").exists()
