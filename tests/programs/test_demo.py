"""The demo in small: table, picture and summary.json, and conclusions that follow from the figures whatever they are."""

import json

from bcr.demo import DemoConfig, conclusions, prepare, run
from bcr.runtime.config import compose


def test_a_short_demo_leaves_its_summary_and_picture(tmp_path, capsys):
    run(prepare(compose("demo", [f"output={tmp_path}", "steps=2", "problems=24", "sizes=[1,3]"], DemoConfig)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    for model in ("base", "bcr"):
        for size in ("1", "3"):
            cell = summary[model][size]
            assert cell["problems"] == 24
            assert 0 <= cell["accuracy"] <= 1
            assert cell["tokens_per_problem"] > 0
            assert cell["checks_per_problem"] >= 0
    assert summary["seconds"] > 0
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert len((tmp_path / "train" / "metrics.jsonl").read_text().splitlines()) == 2
    assert f"{summary['bcr']['1']['tokens_per_problem']:.1f}" in capsys.readouterr().out


def cell(accuracy: float, tokens: float) -> dict:
    return {"accuracy": accuracy, "accuracy_se": 0.01, "tokens_per_problem": tokens, "checks_per_problem": 1.0}


def test_conclusions_follow_from_the_figures():
    base = {"1": cell(0.8, 50.0), "2": cell(0.8, 50.0)}
    good = " ".join(conclusions(base, {"1": cell(0.9, 25.0), "2": cell(0.9, 24.0)}, [1, 2]))
    assert "50% fewer tokens, accuracy +10.0%" in good
    assert "Not shown" not in good
    bad = " ".join(conclusions(base, {"1": cell(0.7, 60.0), "2": cell(0.9, 61.0)}, [1, 2]))
    assert "20% more tokens, accuracy -10.0%" in bad
    assert "do not fall steadily" in bad
    assert "at N = 1 BCR is less accurate" in bad
