"""Rollouts grouped by place and difficulty by hand, and cut to budgets against rollouts that were really sampled under them."""

import pytest

from bcr.analysis.breakdowns import by_difficulty, by_position, under_budgets
from bcr.assemble import load_model
from bcr.evaluate import evaluate_cell
from bcr.records import Bundle, Problem, Rollout, Segment, Verdict
from bcr.runtime.host import choose_device
from bcr.runtime.schema import DialectConfig, ModelConfig
from bcr.sampler import Sampler, SamplingParams
from bcr.tasks.arithmetic import ArithmeticProblems
from bcr.tasks.bundles import Budget
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.judging import Judged

RIGHT, WRONG = Verdict.CORRECT, Verdict.WRONG


def judged(verdicts, lengths, difficulties):
    problems = tuple(Problem(str(k), "1 + 2", "3", "test", difficulty) for k, difficulty in enumerate(difficulties))
    stops = [sum(lengths[: k + 1]) for k in range(len(lengths))]
    segments = tuple(Segment(k, stop - length, stop) for k, (stop, length) in enumerate(zip(stops, lengths, strict=True)))
    return Judged(Bundle("b", problems, [1], 99), Rollout("b", [0] * sum(lengths), [0.0] * sum(lengths), "stop", 0), segments, verdicts, 0)


def test_by_hand():
    rollouts = [judged((RIGHT, WRONG), (10, 20), (2.0, 4.0)), judged((RIGHT, RIGHT, WRONG), (4, 6, 8), (4.0, None, 2.0))]
    assert by_position(rollouts) == {
        1: {"accuracy": 1.0, "tokens": 7.0, "problems": 2},
        2: {"accuracy": 0.5, "tokens": 13.0, "problems": 2},
        3: {"accuracy": 0.0, "tokens": 8.0, "problems": 1},
    }
    assert by_difficulty(rollouts) == {
        2.0: {"accuracy": 0.5, "tokens": 9.0, "problems": 2},
        4.0: {"accuracy": 0.5, "tokens": 12.0, "problems": 2},
    }
    assert list(by_difficulty(rollouts)) == [2.0, 4.0]


def test_a_cut_run_is_the_run_that_had_the_smaller_budget():
    model, dialect = load_model(ModelConfig("builtin/arithmetic-base"), "arithmetic", DialectConfig(), choose_device("cpu"))
    heldout = ArithmeticProblems("heldout")
    problems = [heldout[index] for index in range(18)]
    sampler, params = Sampler(model, max_batch=16, row_block=8), SamplingParams(1.0, 1, dialect.stop_token_ids, 0)
    with GraderPool(1) as pool:
        long = evaluate_cell(sampler, dialect, pool, problems, 3, Budget(total=300), params)
        found = under_budgets(long, [40, 300, 110], dialect, pool)
        for budget in (40, 110, 300):
            sampled = evaluate_cell(sampler, dialect, pool, problems, 3, Budget(total=budget), params)
            assert found[budget] == sampled
        assert list(found) == [40, 110, 300]
        with pytest.raises(ValueError, match=r"^budgets is \[0\]"):
            under_budgets(long, [0], dialect, pool)
