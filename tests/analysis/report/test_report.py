"""The report as a file: complete, whole, of whatever is there, safe against hostile text, and loading nothing from elsewhere."""

import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_sample import RUNS, demo_folder, lines, training_folder

from bcr.analysis.report.folder import read_lines, read_results
from bcr.analysis.report.transcripts import LONGEST_TEXT, MOST_STEPS, pairs, training_rollouts
from bcr.analysis.warning_signs import ADVICE
from bcr.report import main, write_report

HOSTILE = "</script></pre><img src=x onerror=alert(1)>\"'>{{ 7 * 7 }}<!-- \u202e\u2028\x00\ud800 &amp;"


class Reader(HTMLParser):
    """Elements with their attributes, and the text of each kind of element; complains about tags that do not match."""

    VOID = frozenset({"meta", "link", "input", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(folder: Path) -> Reader:
    return Reader(write_report(folder).read_text(encoding="utf-8"))


def words(reader: Reader) -> str:
    return " ".join("".join(parts) for parts in reader.text.values())


def test_a_demo_shows_every_figure_and_every_run(tmp_path):
    folder = demo_folder(tmp_path)
    found = report(folder)
    headings = found.text["figcaption"]
    assert headings[:3] == ["Tokens per problem", "Accuracy, roomy budget", "Accuracy, 110 tokens for all N together"]
    assert headings[3:7] == ["Accuracy at N = 1", "Tokens of a correct answer at N = 1", "N = 1", "N = 3"]
    assert len(found.all("svg")) == len(headings) == 7 + 6 + 4 * 3
    assert len({attributes["id"] for _, attributes in found.elements if "id" in attributes}) == len(
        [1 for _, attributes in found.elements if "id" in attributes]
    )
    text = words(found)
    for title, *_ in RUNS.values():
        assert title in text
    for sentence in ("At N = 1: 54% fewer tokens.", "Not shown: a law.", "Length adaptation until step 12", "No length adaptation"):
        assert sentence in text
    summary = json.loads((folder / "summary.json").read_text())
    cells = [cell for row in found.text["td"] for cell in [row]]
    assert f"{summary['bcr']['3']['tokens_per_problem']:.1f}" in cells
    assert not (tmp_path / ".report.html.tmp").exists()


def test_a_figure_names_every_value_in_words(tmp_path):
    """The description of a figure, for those who cannot see it, holds the numbers of summary.json."""
    folder = demo_folder(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    tokens, accuracy, shared = (svg["aria-label"] for svg in report(folder).all("svg")[:3])
    for key, label in (("base", "base"), ("penalty", "penalty"), ("bcr_tight", "BCR, tight")):
        assert f"{label}: " + ", ".join(f"{cell['tokens_per_problem']:.1f}" for cell in summary[key].values()) in tokens
        assert f"{label}: " + ", ".join(f"{cell['accuracy']:.1%}" for cell in summary[key].values()) in accuracy
    assert "BCR: 90.0%, 93.0%, 91.0%, 59.0%" in shared


def test_intervals_lie_where_the_numbers_say(tmp_path):
    """The upright bar of the base's accuracy at N = 1 spans Wilson's interval on the panel's own scale."""
    found = report(demo_folder(tmp_path))
    bars = [line for line in found.all("line") if line.get("class") == "interval"]
    assert len(bars) == 2 * 6 * 4 + 2 * 4 + 2 * 3
    rules = [float(line["y1"]) for line in found.all("line") if line.get("class") == "rule"]
    top, bottom = min(rules), max(rules[:12])
    low, high = ((bottom - float(bars[24][name])) / (bottom - top) for name in ("y1", "y2"))
    assert (low, high) == pytest.approx((0.819, 0.876), abs=0.002)  # 510 of 600, by hand


def test_a_training_run_alone_has_its_report(tmp_path):
    training_folder(tmp_path / "run")
    found = report(tmp_path / "run")
    assert found.text["h1"] == ["BCR, N = 3, 120 tokens shared"]
    assert "Tokens per problem" in found.text["figcaption"]
    text = words(found)
    assert "Length adaptation until step 12" in text
    assert "bcr.evaluate" in text
    assert len([1 for article in found.all("article") if article.get("class") == "item"]) == 2 * MOST_STEPS


def rewrite(folder: Path, change) -> None:
    """Every step's metrics, changed by `change(step, record)`, step from 0."""
    file = folder / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**record, **change(step, record)}) + "\n" for step, record in enumerate(records)))


def test_a_run_that_leaves_the_path_is_told_so_and_marked(tmp_path):
    training_folder(tmp_path / "well")
    shown = report(tmp_path / "well")
    assert "Length collapse" not in words(shown)
    assert not [line for line in shown.all("line") if line["class"] == "alarm"]
    training_folder(tmp_path / "run")
    rewrite(tmp_path / "run", lambda step, _: {"accuracy": 0.1, "tokens_per_problem": 6.0, "entropy": 0.9} if step >= 25 else {})
    shown = report(tmp_path / "run")
    assert [what for what in shown.text["b"] if "step" in what] == ["Length collapse at step 27.", "Entropy explosion at step 27."]
    assert all(text in words(shown) for text in ADVICE.values())
    assert len([line for line in shown.all("line") if line["class"] == "alarm"]) == 3
    named = " ".join(drawing["aria-label"] or "" for drawing in shown.all("svg"))
    assert named.count("Length collapse at step 27.") == 2
    assert named.count("Entropy explosion at step 27.") == 1


def test_a_stage_that_is_missing_brings_advice_and_one_that_is_there_none(tmp_path):
    draw = random.Random(1)
    for name, change in {
        "no first": lambda step, record: {"tokens_per_problem": 50 + draw.gauss(0, 1)},
        "no second": lambda step, record: {"accuracy": 0.6 + draw.gauss(0, 0.01)},
    }.items():
        training_folder(tmp_path / name)
        assert not [what for what in report(tmp_path / name).text.get("b", []) if "stage" in what]
        rewrite(tmp_path / name, change)
        assert f"{name.capitalize()} stage." in report(tmp_path / name).text["b"]


@pytest.mark.parametrize("keys", [("base",), ("base", "bcr"), ("base", "bcr", "grpo"), tuple(RUNS)])
def test_a_demo_with_missing_parts_is_told_as_far_as_it_went(tmp_path, keys):
    found = report(demo_folder(tmp_path, keys, complete=False))
    assert "has not finished" in words(found)
    for key in RUNS:
        assert (RUNS[key][0] in words(found)) == (key in keys)


def test_runs_that_are_only_announced_do_not_stand_in_the_way(tmp_path):
    """summary.json may speak of runs whose folder and measures do not exist yet, or be all there is."""
    announced = {"runs": {"base": {"title": "Base", "folder": None}, "bcr": {"title": "BCR", "folder": "runs/bcr"}}, "said": [], "bcr": {}}
    (tmp_path / "summary.json").write_text(json.dumps(announced))
    assert "One seed" in words(report(tmp_path))
    (tmp_path / "runs" / "bcr").mkdir(parents=True)
    (tmp_path / "runs" / "bcr" / "metrics.jsonl").write_text("")
    assert "One seed" in words(report(tmp_path))


def test_a_run_that_is_still_writing_is_read_up_to_its_last_whole_line(tmp_path):
    training_folder(tmp_path / "run", steps=5)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    assert len(read_lines(metrics)) == 4
    assert "4 steps: too few to look for stages" in words(report(tmp_path / "run"))
    metrics.write_text("")
    assert "No step is finished yet." in words(report(tmp_path / "run"))


def test_a_metric_that_is_not_a_number_leaves_a_gap(tmp_path):
    training_folder(tmp_path / "run", steps=12)
    file = tmp_path / "run" / "metrics.jsonl"
    records = read_lines(file)
    records[3]["entropy"] = float("nan")
    lines(file, records)
    assert "nan" not in " ".join(line.get("points") or "" for line in report(tmp_path / "run").all("polyline"))


def test_hostile_text_stays_text(tmp_path):
    folder = demo_folder(tmp_path, ("base", "bcr"))
    before = report(folder)
    hostile = json.dumps(HOSTILE)[1:-1]
    summary = (folder / "summary.json").read_text().replace("Not shown: a law.", hostile).replace(RUNS["bcr"][0], hostile)
    (folder / "summary.json").write_text(summary)
    for file in (folder / "evaluations.jsonl", folder / "runs" / "bcr" / "rollouts.jsonl"):
        records = read_lines(file)
        for record in records:
            for problem in record["problems"]:
                problem["question"] = problem["answer"] = HOSTILE
            for segment in record["segments"]:
                segment["text"] = HOSTILE
        lines(file, records)
    found = report(folder)
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in before.elements]  # not one element more
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    shown = HOSTILE.replace("\ud800", "?")
    assert [text.replace("\r\n", "\n") for text in found.text["pre"]].count(shown) > 20
    assert shown in found.text["li"]
    assert shown in found.text["h1"]


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    """No address in the page but the text of an arXiv number; one script, which the page's own policy pins by its hash."""
    file = write_report(demo_folder(tmp_path))
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    found = Reader(text)
    assert all(attributes["href"].startswith(("#", "data:")) for tag, attributes in found.elements if "href" in attributes)
    assert not any("src" in attributes for _, attributes in found.elements)
    policy = next(meta["content"] for meta in found.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    assert "script-src 'sha256-" in policy


def test_every_transcript_of_the_pairs_is_of_the_same_problems(tmp_path):
    listing = pairs(read_results(demo_folder(tmp_path)))
    assert len(listing.items) == 5 * 2 * 12
    assert listing.places == [1, 3]
    assert {item.run for item in listing.items} == set(RUNS) - {"base"}
    for item in listing.items:
        assert item.rollouts[0].heading == "base"
        base, other = ([verdict == "correct" for verdict in rollout.outcome] for rollout in item.rollouts)
        gained = any(now and not before for before, now in zip(base, other, strict=True))
        assert ("gained" in item.tags.split()) == gained


def test_training_rollouts_are_those_of_the_first_and_last_steps_and_some_between(tmp_path):
    listing = training_rollouts(read_results(demo_folder(tmp_path)).runs)
    assert len(listing.places) == MOST_STEPS
    assert (listing.places[0], listing.places[-1]) == (1, 40)
    strengths = [segment.strength for item in listing.items if item.run == "bcr" for segment in item.rollouts[0].segments]
    assert max(strengths) == 1.0
    assert min(strengths) >= 0.0


def test_long_texts_are_cut_in_the_middle_and_say_so(tmp_path):
    folder = demo_folder(tmp_path, ("base", "bcr"))
    records = read_lines(folder / "evaluations.jsonl")
    records[0]["segments"][0]["text"] = "a" * 50_000 + "b" * 50_000
    lines(folder / "evaluations.jsonl", records)
    (text,) = {text for text in report(folder).text["pre"] if "left out" in text}
    assert len(text) < LONGEST_TEXT + 100
    assert f"{100_000 - LONGEST_TEXT:,} characters" in text


def test_a_folder_without_results_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("bcr.report: ")
    assert "neither summary.json (a demo) nor metrics.jsonl (a training run)" in said
    assert len(said.strip().splitlines()) == 1
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json is not JSON"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="neither"):
        write_report(tmp_path / "nowhere")


def test_help_says_what_it_makes_and_of_what(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "python -m bcr.report" in said
    assert "FOLDER/report.html" in said
    assert "outputs/train" in said


def test_the_program_needs_no_torch_and_says_where_the_report_is(tmp_path):
    training_folder(tmp_path / "run", steps=3)
    code = (
        f"import sys; sys.modules['torch'] = sys.modules['triton'] = None; from bcr.report import main; main([{str(tmp_path / 'run')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=100, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "run" / "report.html")


def contrast(one: str, other: str) -> float:
    """WCAG 2.1 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_colour_of_text_can_be_read_on_both_backgrounds(scheme):
    style = (Path(__file__).parents[3] / "bcr" / "analysis" / "report" / "style.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", style.split(":root {")[1 + scheme]))
    for name in ("ink", "soft", "accent", "base", "bcr", "grpo", "bcr-tight", "same-cap", "penalty", "good", "bad"):
        for ground in ("paper", "card"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
