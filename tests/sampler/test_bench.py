"""The sampler's bench runs on a tiny model and says all that it promises."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_continuous_batching_runs_beside_it_or_is_said_to_be_missing() -> None:
    names = [row["name"] for case in run("peers=2")["cases"] for row in case["results"]]
    assert names.count("transformers continuous batching") == 2
    late = [row for case in run("peers=2", "limit_s=1")["cases"] for row in case["results"] if "missing" in row]
    assert [row["missing"] for row in late] == ["did not return within 1 s"] * 2
