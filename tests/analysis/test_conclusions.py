"""What the demo says follows from its figures, whatever they are."""

from rich.console import Console

from bcr.analysis.conclusions import CAVEATS, conclusions, results_table
from bcr.analysis.measures import hardest_problems
from bcr.records import Bundle, Problem, Rollout, Segment, Verdict
from bcr.tasks.judging import Judged


def cell(accuracy: float, tokens: float, unanswered: float = 0.0) -> dict:
    return {"accuracy": accuracy, "accuracy_se": 0.01, "tokens_per_problem": tokens, "unanswered": unanswered}


BASE = {"1": cell(0.8, 50.0), "2": cell(0.8, 50.0)}


def said(**runs) -> str:
    return " ".join(conclusions({"base": BASE, **runs}, [1, 2]))


def test_base_against_bcr():
    good = said(bcr={"1": cell(0.9, 25.0), "2": cell(0.85, 24.0)})
    assert "BCR at N = 1: 50% fewer tokens, accuracy +10.0 points (standard error 1.4)." in good
    assert "least so at N = 2: +5.0 points" in good
    assert "fall as N grows (25.0, 24.0)" in good
    assert "Not shown" not in good
    bad = said(bcr={"1": cell(0.7, 60.0), "2": cell(0.9, 61.0)})
    assert "20% more tokens, accuracy -10.0 points" in bad
    assert "Not shown: at N = 1 BCR is less accurate than the base (N = 1: -10.0 points" in bad
    assert "Not shown: tokens per problem do not fall steadily" in bad


def test_grpo_grows_or_does_not():
    bcr = {"1": cell(0.9, 25.0), "2": cell(0.85, 24.0)}
    assert "60% more tokens, 3.2 times BCR's, accuracy +15.0 points" in said(bcr=bcr, grpo={"1": cell(0.95, 80.0)})
    assert "Not shown: plain GRPO did not grow longer (20% fewer tokens" in said(grpo={"1": cell(0.95, 40.0)})


def test_pooling_shows_only_beyond_two_standard_errors():
    hardest = {"operations": 4, "tokens_needed": 25.4, "cap": 22, "accuracy": {"bcr_tight": 0.9, "same_cap": 0.05}}
    clear = said(bcr_tight={"1": cell(0.92, 20.0)}, same_cap={"1": cell(0.65, 18.0)}, hardest=hardest)
    assert "Sharing a tight budget against the same cap for each at N = 1: +27.0 points (standard error 1.4)." in clear
    assert (
        "Why: correct answers to problems of 4 operations take 25 tokens, the cap is 22; of these the shared budget gets 90% right" in clear
    )
    unclear = said(bcr_tight={"1": cell(0.66, 20.0)}, same_cap={"1": cell(0.65, 18.0)}, hardest=hardest)
    assert "Not shown: sharing a tight budget" in unclear
    assert "Why" not in unclear


def test_a_collapse_is_called_so_only_where_there_is_one():
    assert "The length penalty collapsed: 9.0% right in 5.0 tokens at N = 1; it guesses" in said(penalty={"1": cell(0.09, 5.0)})
    assert "0.0% right in 1.0 tokens at N = 1; it stopped answering" in said(penalty={"1": cell(0.0, 1.0, unanswered=1.0)})
    assert "Not shown: the length penalty did not collapse" in said(penalty={"1": cell(0.7, 15.0)})


def test_nothing_is_said_of_what_is_not_done():
    assert conclusions({}, [1, 2]) == []
    assert said() == ""
    assert said(bcr=BASE).endswith(CAVEATS[-1])


def test_the_table_fits_80_columns_and_names_its_error():
    titles = {"base": "The base", "bcr": "BCR, N = 1 to 6", "grpo": "GRPO, N = 1"}
    sizes = [1, 2, 3, 6]
    cells = {name: {str(size): cell(0.9, 50.0) for size in sizes} for name in ("base", "bcr")}
    console = Console(width=80)
    with console.capture() as captured:
        console.print(results_table({"runs": {name: {"title": title} for name, title in titles.items()}, **cells}, sizes))
    text = captured.get()
    assert "GRPO" not in text  # begun, not measured
    assert "  BCR, N = 1 to 6   90.0% / 50.0   90.0% / 50.0   90.0% / 50.0   90.0% / 50.0" in text
    assert "up to 1.0 points" in text


def test_the_hardest_problems_are_told_apart():
    def single(operations, verdict, tokens):
        problem = Problem("p", "1 + 2", "3", "test", float(operations))
        rollout = Rollout("r", [0] * tokens, [-0.1] * tokens, "stop", 0)
        return Judged(Bundle("b", (problem,), [1], 99), rollout, (Segment(0, 0, tokens),), (verdict,), 0)

    right, wrong = Verdict.CORRECT, Verdict.WRONG
    tight = [single(4, right, 24), single(4, right, 26), single(4, wrong, 90), single(2, right, 15)]
    capped = [single(4, wrong, 22), single(4, right, 20), single(2, right, 15)]
    found = hardest_problems(tight, capped, cap=22)
    assert (found["operations"], found["cap"], found["tokens_needed"]) == (4, 22, 25.0)
    assert found["accuracy"] == {"bcr_tight": 2 / 3, "same_cap": 0.5}
    assert found["by_operations"]["same_cap"]["2"]["accuracy"] == 1.0
    assert hardest_problems([single(4, wrong, 9)], capped, cap=22)["tokens_needed"] is None
