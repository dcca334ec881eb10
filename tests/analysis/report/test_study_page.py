"""The page of a study: everything in study.json is on it, escaped; every figure says its numbers."""

import json

import pytest
from markupsafe import escape
from study_sample import CELLS, study_folder, study_summary

from bcr.analysis.report import study_panels as panels
from bcr.report import write_report


@pytest.fixture(scope="module")
def summary() -> dict:
    return study_summary()


def test_the_page_says_what_the_summary_says(tmp_path):
    page = write_report(study_folder(tmp_path)).read_text()
    summary = json.loads((tmp_path / "study.json").read_text())
    assert "A study &amp; its cells" in page
    assert "&lt;share&gt;" in page
    assert "<share>" not in page
    assert "**" not in page
    for sentence in summary["said"]:
        assert str(escape(sentence)) in page
    assert page.count("<svg") == 1 + 3 + 2 * len(CELLS) + len(CELLS) + 1
    assert "http:" not in page.replace("http://www.w3.org", "")


def test_figures_say_their_numbers_in_words(summary):
    drawn = panels.accuracy_against_tokens(summary)
    for name, cell in summary["cells"].items():
        at = cell["sizes"]["1"]
        assert f"{cell['label']}: {at['accuracy'][0]:.1%} in {at['tokens'][0]:.1f}" in drawn, name
    value = 100 * summary["compare"][1]["sizes"]["1"]["accuracy"]["difference"][0]
    assert f"bcr less same cap: {'−' if value < 0 else '+'}{abs(value):.1f}" in panels.differences(summary, "accuracy", "1")


def test_a_study_that_has_measured_only_its_base_has_a_page_too(tmp_path, summary):
    begun = {**summary, "cells": {"base": summary["cells"]["base"]}, "compare": [], "missing": list(CELLS), "said": []}
    (tmp_path / "study.json").write_text(json.dumps(begun))
    assert "has not finished" in write_report(tmp_path).read_text()


def test_a_folder_with_another_study_json_is_told_so(tmp_path):
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no 'study'; it must be the study.json of a study"):
        write_report(tmp_path)
