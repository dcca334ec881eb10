"""The summary of a study against figures counted by hand: two problems a prompt, two seeds, a base measured once."""

import pytest

from bcr.analysis.study import by_prompt, summarise_study
from bcr.analysis.study_findings import direction, findings
from bcr.analysis.study_tables import overview

PROBLEMS = 12


def cell(outcomes: str, tokens: int, cut: str) -> dict:
    """What study_cell.measure keeps of one N; problems at odd places have four operations, the others two."""
    groups = {level: [place for place in range(PROBLEMS) if place % 2 == odd] for level, odd in (("2", 0), ("4", 1))}
    by_difficulty = {
        level: {"accuracy": sum(outcomes[p] == "c" for p in places) / len(places), "tokens": float(tokens), "problems": len(places)}
        for level, places in groups.items()
    }
    rest = dict.fromkeys(("checks_per_problem", "truncated", "unanswered", "loops_per_thousand", "repetition"), 0.5)
    lengths = {"tokens_correct": float(tokens), "tokens_wrong": None}
    by_position = {"1": {"accuracy": 1.0, "tokens": float(tokens), "problems": PROBLEMS}}
    counted = {"outcomes": outcomes, "tokens": [tokens] * PROBLEMS, "cut": {"10": cut, "110": outcomes}}
    return {
        **counted,
        **rest,
        **lengths,
        "by_difficulty": by_difficulty,
        "by_position": by_position,
        "accuracy": outcomes.count("c") / PROBLEMS,
    }


def result(name: str, seed: int, right: int, tokens: tuple[int, int]) -> dict:
    """The first `right` problems are correct; none within 10 tokens."""
    outcomes, wrong = "c" * right + "w" * (PROBLEMS - right), "u" * PROBLEMS
    return {
        "cell": name,
        "seed": seed,
        "config": {"data.operations": [2, 3, 4], "bundles.sizes": [1]},
        "measurement": {"problems": PROBLEMS, "sizes": [1, 2], "roomy": 130, "cut_at": [10, 110]},
        "seconds": {"training": 3.0, "evaluation": 1.0},
        "training": None if name == "base" else {"steps": 5, "problems": 40, "tokens": 1000},
        "difficulties": [2.0, 4.0] * (PROBLEMS // 2),
        "sizes": {"1": cell(outcomes, tokens[0], wrong), "2": cell(outcomes, tokens[1], wrong)},
    }


def about(*names: str) -> dict:
    return {name: {"title": f"the {name}", "label": name, "overrides": []} for name in names}


@pytest.fixture
def summary() -> dict:
    results = {
        "base": [result("base", 0, 8, (50, 51))],
        "good": [result("good", seed, right, (20, 18)) for seed, right in ((0, 12), (1, 10))],
        "bad": [result("bad", 1, 2, (2, 9))],
    }
    compare = [["good", "base"], ["good", "bad"], ["bad", "base"], ["good", "unborn"]]
    return summarise_study("tiny", "A tiny study", about("good", "bad", "unborn"), compare, results)


def test_a_cell_is_the_mean_over_its_seeds(summary):
    good = summary["cells"]["good"]
    assert good["seeds"] == [0, 1]
    assert good["sizes"]["1"]["accuracy"][0] == pytest.approx(11 / 12, abs=1e-5)
    assert good["sizes"]["1"]["by_seed"] == {"accuracy": [1.0, 0.83333], "tokens": [20.0, 20.0]}
    assert good["sizes"]["1"]["tokens"] == [20.0, 20.0, 20.0]
    assert good["sizes"]["2"]["cut"] == {"10": 0.0, "110": 0.91667}
    assert good["training"] == {"steps": 5.0, "problems": 40.0, "tokens": 1000.0}
    assert good["sizes"]["1"]["tokens_wrong"] is None
    low, high = good["sizes"]["1"]["accuracy"][1:]
    assert 0.75 < low < 11 / 12 < high == 1.0
    assert summary["missing"] == ["unborn"]


def test_comparisons_are_paired_over_the_seeds_that_both_have(summary):
    base, bad, _ = summary["compare"]
    assert (base["seeds"], bad["seeds"]) == ([0, 1], [1])  # the base has one measurement, and is compared with every seed
    assert base["sizes"]["1"]["accuracy"]["by_seed"] == [pytest.approx(4 / 12, abs=1e-5), pytest.approx(2 / 12, abs=1e-5)]
    assert base["sizes"]["1"]["accuracy"]["difference"][0] == pytest.approx(3 / 12, abs=1e-5)
    assert base["sizes"]["2"]["tokens"]["difference"] == [-33.0, -33.0, -33.0]
    assert bad["sizes"]["1"]["accuracy"]["difference"][0] == pytest.approx(8 / 12, abs=1e-5)
    hardest = base["hardest"]["difference"]  # of the six with four operations the base has four, the two seeds six and five
    assert hardest[0] == pytest.approx(1.5 / 6, abs=1e-5)


def test_pairing_is_narrower_than_two_intervals(summary):
    """All of what the problems share in difficulty cancels: the first eight are right in both."""
    value, low, high = summary["compare"][0]["sizes"]["1"]["accuracy"]["difference"]
    alone = summary["cells"]["base"]["sizes"]["1"]["accuracy"]
    assert low < value < high
    assert high - low < alone[2] - alone[1]


def test_the_law_is_that_of_the_mean_and_of_each_seed(summary):
    law = summary["cells"]["good"]["law"]
    assert law["exponent"] == pytest.approx(0.152, abs=1e-3)  # log2(20 / 18)
    assert law["by_seed"] == [law["exponent"]] * 2
    assert law["monotone_by_seed"] == [True, True]
    assert law["last_less_first"]["difference"] == [-2.0, -2.0, -2.0]
    assert summary["cells"]["base"]["law"]["monotone"] is False


def test_what_is_left_is_measured_where_it_was_trained(summary):
    assert summary["cells"]["base"]["kept"] == [None]
    assert summary["cells"]["good"]["kept"] == [1.5, 1.25]
    assert summary["cells"]["bad"]["kept"] == [0.25]


def test_the_sentences_say_what_is_shown_and_what_is_not(summary):
    said = " ".join(findings(summary))
    assert "good against base (2 seeds): more accurate at N = 1 (+25.0 points), no difference shown at N = 2 (+25.0)" in said
    assert "shorter at every N (−33.0 to −30.0 tokens a problem)." in said
    assert "Tokens per problem fall from N = 1 to N = 2: good (−2.0, 2 seeds)." in said
    assert "Tokens per problem rise from N = 1 to N = 2: base (+1.0, 1 seed), bad (+7.0, 1 seed)." in said
    assert "Collapsed, that is below half" in said
    assert "bad (1 of 1 seed, 25% of it left at the worst)" in said
    assert direction({"difference": [0.1, -0.01, 0.2], "by_seed": [0.1]}) == 0
    assert summary["said"] == findings(summary)


def test_the_table_has_a_row_for_each_cell(summary):
    assert overview(summary).row_count == 3


def test_prompts_are_the_unit():
    assert by_prompt([[1, 0, 0, 0], [1, 1, 0, 1]], 2) == [0.75, 0.25]
