"""Bundles by difficulty: nothing lost, nothing twice, means as equal (or different) as asked, and a state to go on from."""

import json
import random
import statistics
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bcr.records import Problem
from bcr.tasks.arithmetic import ArithmeticDialect, ArithmeticProblems, build_tokenizer
from bcr.tasks.arrangement import ARRANGEMENTS, ArrangedBundles, arrange, spread
from bcr.tasks.bundles import Budget, cyclic_bundles

calm = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
DIALECT = ArithmeticDialect(build_tokenizer())
BUDGET = Budget(total=60)


def rated(difficulties):
    questions = [ArithmeticProblems("train")[0].question] * len(difficulties)
    return [Problem(str(k), question, "0", "test", d) for k, (question, d) in enumerate(zip(questions, difficulties, strict=True))]


def means(bundles):
    return [statistics.mean(problem.difficulty for problem in problems) for problems in bundles if len(problems) > 1]


@calm
@given(st.lists(st.integers(1, 6), min_size=1, max_size=20), st.sampled_from(ARRANGEMENTS), st.integers(0, 99))
def test_every_problem_is_in_one_bundle_of_its_size(sizes, arrangement, seed):
    rng = random.Random(seed)
    problems = rated([rng.choice([1.0, 2.5, 7.0]) for _ in range(sum(sizes))])
    bundles = arrange(problems, sizes, arrangement, rng)
    assert [len(bundle) for bundle in bundles] == sizes
    assert Counter(problem.id for bundle in bundles for problem in bundle) == Counter(problem.id for problem in problems)


@pytest.mark.parametrize("sizes", [[3] * 300, [2] * 450, [5] * 180, [1, 2, 3] * 150])
def test_stratified_bundles_are_equally_hard_and_homogeneous_ones_are_not(sizes):
    """The paper's case, made of half levels like DeepMath's: far narrower than by chance, which is far narrower than like with like."""
    rng = random.Random(0)
    problems = rated([rng.choice([3, 4, 4.5, 5, 5, 5.5, 6, 6, 6.5, 7, 7.5, 8, 9]) for _ in range(900)])
    spreads = {how: statistics.pstdev(means(arrange(problems, sizes, how, rng))) for how in ARRANGEMENTS}
    assert spreads["stratified"] < 0.3 * spreads["mixed"]
    assert spreads["homogeneous"] > 1.3 * spreads["mixed"]
    inside = [statistics.pstdev([p.difficulty for p in bundle]) for bundle in arrange(problems, sizes, "homogeneous", rng)]
    assert statistics.mean(inside) < 0.05
    singles = [bundle[0].difficulty for bundle in arrange(problems, sizes, "stratified", rng) if len(bundle) == 1]
    overall = statistics.mean(problem.difficulty for problem in problems)
    assert not singles or statistics.mean(singles) == pytest.approx(overall, abs=0.1)


def test_hard_problems_stand_at_every_position():
    problems = rated([float(k) for k in range(900)])
    bundles = arrange(problems, [3] * 300, "stratified", random.Random(0))
    hardest = Counter(max(range(3), key=lambda k: bundle[k].difficulty) for bundle in bundles)
    assert all(70 < hardest[k] < 130 for k in range(3))


@calm
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_a_spread_is_distinct_and_even(total, count, seed):
    problems = rated([float(k) for k in range(total)])
    count = min(count, total)
    chosen = sorted(problem.difficulty for problem in spread(problems, count, random.Random(seed)))
    assert len(set(chosen)) == count
    assert all(abs(difficulty - (k + 0.5) * total / count) <= total / count + 1 for k, difficulty in enumerate(chosen))


def stream(problems, arrangement="stratified", count=None, sizes=None, seed=0):
    return ArrangedBundles(problems, DIALECT, sizes or {3: 1.0}, BUDGET, arrangement, count, seed)


def test_a_fixed_number_of_bundles_comes_again_every_epoch():
    problems = rated([float(k % 7) for k in range(40)])
    bundles = stream(problems, count=10)
    first, second = bundles.take(10), bundles.take(10)
    asked = [frozenset(problem.id for problem in bundle.problems) for bundle in first]
    assert Counter(asked) == Counter(frozenset(problem.id for problem in bundle.problems) for bundle in second)
    assert asked != [frozenset(problem.id for problem in bundle.problems) for bundle in second]
    assert len(frozenset.union(*asked)) == 30
    assert len({bundle.id for bundle in [*first, *second]}) == 20


def test_without_a_number_every_epoch_is_arranged_anew():
    problems = rated([float(k % 7) for k in range(31)])
    bundles = stream(problems)
    epochs = [[tuple(problem.id for problem in bundle.problems) for bundle in bundles.take(10)] for _ in range(3)]
    assert all(len({id for bundle in epoch for id in bundle}) == 30 for epoch in epochs)
    assert len({frozenset(map(frozenset, epoch)) for epoch in epochs}) == 3


@calm
@given(st.sampled_from(ARRANGEMENTS), st.sampled_from([None, 4]), st.integers(0, 30), st.integers(0, 9), st.integers(0, 3))
def test_it_goes_on_from_its_state(arrangement, count, before, after, seed):
    problems = rated([float(k % 5) for k in range(17)])
    options = {"arrangement": arrangement, "count": count, "sizes": {1: 1.0, 3: 2.0}, "seed": seed}
    whole, first, second = (stream(problems, **options) for _ in range(3))
    taken = first.take(before)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert taken + second.take(after) == whole.take(before + after)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"arrangement": "easy"}, "bundles.arrangement is 'easy'; it must be one of mixed, stratified, homogeneous."),
        ({"count": 0}, "bundles.count is 0"),
        ({"count": 4}, "bundles.count and bundles.sizes call for 12 problems; the data has 9."),
        ({"sizes": {6: 1.0}, "count": 2}, "call for 12 problems"),
    ],
)
def test_what_cannot_be_arranged_is_refused(options, sentence):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        stream(rated([1.0] * 9), **options)
    assert sentence in str(refusal.value)


def test_a_problem_without_difficulty_is_refused():
    problems = [*rated([1.0] * 5), Problem("x", "1 + 1", "2", "test", None)]
    with pytest.raises(ValueError, match="1 problems have no difficulty, such as 'x'"):
        stream(problems)
    assert len(stream(problems, arrangement="mixed").take(2)) == 2


# ---- REST's cyclic bundles -----------------------------------------------------------------------------------------------------


@calm
@given(st.integers(1, 20), st.integers(1, 6))
def test_cyclic_bundles_put_every_problem_at_every_position(total, size):
    problems = rated([1.0] * total)
    if size > total:
        with pytest.raises(ValueError, match="cyclic bundles would ask one twice"):
            cyclic_bundles(problems, size, DIALECT, BUDGET, "x")
        return
    bundles = cyclic_bundles(problems, size, DIALECT, BUDGET, "x")
    for position in range(size):
        assert sorted(bundle.problems[position].id for bundle in bundles) == sorted(problem.id for problem in problems)
    assert len({bundle.id for bundle in bundles}) == total
    following = {problem.id: problems[(k + 1) % total].id for k, problem in enumerate(problems)}
    for bundle in bundles:
        asked = [problem.id for problem in bundle.problems]
        assert asked[1:] == [following[id] for id in asked[:-1]]
