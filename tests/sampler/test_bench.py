"""The sampler's bench runs on a tiny model and says all that it promises."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import nano_vllm
from bench import sampler as bench
from bench._sampler_work import decoder, grouped

ROOT = Path(__file__).parents[2]
SMALL = ["shape=tiny", "requests=3", "shortest=3", "longest=6", "groups=1", "budget=4", "repeats=1"]


def run(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "bench.sampler", *SMALL, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_row_of_both_workloads() -> None:
    record = run("peers=1")
    uniform, groups = record["cases"]
    assert [row["name"] for row in uniform["results"]] == ["bcr.sampler", "bcr.sampler, no log-probs", "transformers generate"]
    assert [row["name"] for row in groups["results"]][2] == "bcr.sampler, no fork"
    for case in record["cases"]:
        assert len({row["tokens"] for row in case["results"]}) == 1
        for row in case["results"]:
            assert row["tokens_per_s"] > 0
            assert 0 < row["limit"] < 1
        assert case["results"][0]["first_token"] <= case["results"][0]["seconds"]
        assert case["memory"]["cache"] > 0


def test_a_case_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every peer; what they measure is not looked at here."""
    monkeypatch.setattr(bench, "measured", lambda name, *_: {"name": name, "tokens_per_s": 1.0})
    monkeypatch.setattr(bench.peers_of, "load", lambda *_: None)
    work, n = grouped(1, 4, 96, random.Random(0))
    options = {"device": "cpu", "repeats": 1, "peers": 2, "peer_batch": 1, "limit_s": 1}
    assert bench.case("groups", bench.Watched(decoder("tiny", "cpu")), work, n, 1.0, options, "")["case"] == "groups"


def test_the_long_workload_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano_vllm, "matmul_peak", lambda *_: 1e12)
    monkeypatch.setattr(nano_vllm, "copy_rate", lambda *_: 1e11)
    monkeypatch.setattr(nano_vllm, "settle_in", lambda _: None)
    file = tmp_path / "found.json"
    work = {"shape": "tiny", "requests": "3", "shortest": "3", "longest": "6", "peer_batch": "2", "results": str(file)}
    with monkeypatch.context() as patch:
        patch.setattr(nano_vllm, "time", SimpleNamespace(perf_counter=iter([0, 1, 2, 100]).__next__))
        first = nano_vllm.main(**work, seconds="50")  # it is 100 when the last part would begin
    assert set(first["parts"]) == {"bcr.sampler", "generate 1"}
    assert "ratio" not in first["table"]
    second = nano_vllm.main(**work)
    assert set(second["parts"]) == {"bcr.sampler", "generate 1", "generate 2"}
    assert {name: second["parts"][name] for name in first["parts"]} == first["parts"]
    rows = second["table"]
    assert rows["bcr.sampler"]["tokens"] == rows["generate"]["tokens"]
    assert rows["ratio"] == pytest.approx(rows["generate"]["seconds"] / rows["bcr.sampler"]["seconds"])
    assert json.loads(file.read_text()) == second
    with pytest.raises(ValueError, match="are of other work"):
        nano_vllm.main(**work | {"requests": "4"})


@pytest.mark.slow
def test_continuous_batching_runs_beside_it_or_is_said_to_be_missing() -> None:
    names = [row["name"] for case in run("peers=2")["cases"] for row in case["results"]]
    assert names.count("transformers continuous batching") == 2
    late = [row for case in run("peers=2", "limit_s=1")["cases"] for row in case["results"] if "missing" in row]
    assert [row["missing"] for row in late] == ["did not return within 1 s"] * 2
