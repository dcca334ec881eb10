"""docs/results.md says what the JSON beside it says: tables, sentences and figures are written by code, and this compares them."""

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest
from study_sample import study_folder

from bcr.analysis.study_answers import QUESTIONS, answers
from bcr.analysis.study_figures import FIGURES
from bcr.results import BLOCK, BLOCKS, main, read_summaries, render

DOCUMENT = Path(__file__).parents[2] / "docs" / "results.md"
DATA = DOCUMENT.with_suffix("")
WIDEST = 8.5  # pixels of a character, in any reader's font


def test_the_document_is_what_its_data_says():
    text = DOCUMENT.read_text()
    assert render(text, read_summaries(DATA)) == text


def test_no_figure_stands_outside_what_is_written_by_code():
    """Percentages and differences belong into blocks, where they follow the data."""
    prose = BLOCK.sub("", DOCUMENT.read_text())
    assert re.findall(r"\d[\d.]* ?%(?! boot)|[+−]\d", prose) == []


def test_the_figures_are_those_of_the_data():
    summaries = read_summaries(DATA)
    for name, (experiment, draw) in FIGURES.items():
        file = DATA / f"{name}.svg"
        assert draw(summaries[experiment]) == file.read_text(), f"{file.name}: python -m bcr.results docs/results.md"
        drawing = xml.etree.ElementTree.parse(file).getroot()
        assert drawing.get("aria-label")
        assert f"results/{name}.svg" in DOCUMENT.read_text()
        assert not re.search(r"(href|src)=", file.read_text())
        left = float(drawing.get("viewBox").split()[0])
        texts = drawing.iter("{http://www.w3.org/2000/svg}text")
        starts = [float(text.get("x")) - WIDEST * len(text.text) for text in texts if text.get("text-anchor") == "end"]
        assert all(start > left for start in starts), f"{file.name}: words are cut at the left"


def test_the_data_is_small_and_of_the_listed_studies():
    files = sorted(DATA.glob("*.json"))
    assert [file.stem for file in files] == ["penalty", "recipes", "rivals"]
    assert sum(file.stat().st_size for file in files) < 500_000


def test_every_question_has_an_answer_also_before_its_cells_are_there(tmp_path):
    summary = json.loads((study_folder(tmp_path) / "study.json").read_text())
    for question in QUESTIONS:
        assert all(sentence.endswith(".") for sentence in answers(summary, question)), question
    with pytest.raises(ValueError, match="'why' is no question"):
        answers(summary, "why")


def test_a_document_is_written_from_a_study(tmp_path, capsys):
    study_folder(tmp_path / "out" / "sample")
    document = tmp_path / "page.md"
    blocks = ("<!-- sample at_one -->\nstale\n<!-- end -->", "<!-- sample under_shared 110 -->\n<!-- end -->")
    document.write_text("\n\n".join(["# Kept", *blocks, "Kept too."]))
    main([str(document), "--studies", str(tmp_path / "out")])
    text = document.read_text()
    summary = json.loads((tmp_path / "page" / "sample.json").read_text())
    assert summary == json.loads((tmp_path / "out" / "sample" / "study.json").read_text())
    assert text.startswith("# Kept\n")
    assert text.endswith("Kept too.")
    assert "stale" not in text
    for cell in summary["cells"].values():
        assert f"{100 * cell['sizes']['1']['accuracy'][0]:.1f} [" in text
        assert f"{100 * cell['sizes']['3']['cut']['110']:.1f}" in text
    main([str(document)])
    assert document.read_text() == text
    document.write_text("<!-- sample nonsense -->\n<!-- end -->\n")
    with pytest.raises(SystemExit) as ended:
        main([str(document)])
    assert ended.value.code == 2
    assert f"each with {', '.join(BLOCKS)}" in capsys.readouterr().err
