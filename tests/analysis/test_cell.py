"""One cell of an evaluation: what its intervals resample, and what it says of samples and loops, by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcr.analysis.cell import describe
from bcr.records import Bundle, Problem, Rollout, Segment, Verdict
from bcr.tasks.arithmetic import ArithmeticDialect, build_tokenizer
from bcr.tasks.judging import Judged

DIALECT = ArithmeticDialect(build_tokenizer())


def rollout(name, problems, rights, text="so 3 . <eos>"):
    """One rollout of a prompt of `problems`, each right or not."""
    tokens = DIALECT.tokenizer.encode(text, add_special_tokens=False).ids
    bundle = Bundle(name, tuple(Problem(f"p{k}", "1 + 2", "3", "test") for k in problems), [1], 99)
    verdicts = tuple(Verdict.CORRECT if right else Verdict.WRONG for right in rights)
    return Judged(bundle, Rollout(name, tokens, [-0.1] * len(tokens), "stop", 0), (Segment(0, 0, len(tokens)),), verdicts, 0)


def width(rollouts):
    low, high = describe(rollouts, DIALECT)["accuracy_interval"]
    return high - low


def test_problems_of_one_prompt_are_no_independent_witnesses():
    """60 prompts of three that are right or wrong together say as much as 60 single problems, not as much as 180."""
    rights = [k % 4 > 0 for k in range(60)]
    packed = [rollout(f"b{k}", range(3 * k, 3 * k + 3), [right] * 3) for k, right in enumerate(rights)]
    single = [rollout(f"b{k}", [k], [right]) for k, right in enumerate(rights)]
    assert width(packed) == pytest.approx(width(single))


def test_where_a_problem_stands_in_several_prompts_the_problem_is_the_unit():
    """REST's bundles of two over three problems, of which one is never solved: the interval is that of three problems."""
    cyclic = [rollout(f"b{k}", [k, (k + 1) % 3], [k > 0, (k + 1) % 3 > 0]) for k in range(3)]
    assert (
        describe(cyclic, DIALECT)["accuracy_interval"]
        == describe([rollout(f"s{k}", [k], [k > 0]) for k in range(3)], DIALECT)["accuracy_interval"]
    )


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=5))
def test_pass_at_k_rises_with_k_up_to_the_share_ever_solved(table):
    cell = describe([rollout(f"b{p}", [p], [right]) for p, row in enumerate(table) for right in row], DIALECT)
    assert list(cell["pass_at_k"]) == list(cell["pass_at_k_interval"]) == ["2", "4", "5"]
    found = [cell["accuracy"], *cell["pass_at_k"].values()]
    assert found == pytest.approx(sorted(found))
    assert found[-1] == pytest.approx(sum(map(any, table)) / len(table))
    for k, (low, high) in cell["pass_at_k_interval"].items():
        assert low - 1e-9 <= cell["pass_at_k"][k] <= high + 1e-9


def test_the_share_of_completions_with_a_loop():
    checked = "wait check 1 + 2 = 3 so 3 . <eos>"
    cell = describe([rollout("a", [0], [True], checked), *(rollout(f"b{k}", [k + 1], [True]) for k in range(3))], DIALECT)
    assert cell["with_loops"] == 0.25
    assert cell["loops_per_thousand"] == pytest.approx(1000 / (11 + 3 * 4))
