import contextlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcr.records import Verdict
from bcr.tasks import grader_pool
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.grader_worker import LENGTHS, decode, encode
from tests.tasks.hostile import KINDS, TRACE, hostile

REPO = Path(__file__).parents[2]
HANGS = ("x+1", r"\binom{9999999}{4999999}")  # passes the guards, takes minutes and little memory
GOOD = [("x^2-1", "(x-1)(x+1)", Verdict.CORRECT), ("2x", "3x", Verdict.WRONG), ("x+1", "x+&", Verdict.UNPARSED)]


@pytest.fixture
def pool() -> Iterator[GraderPool]:
    with GraderPool(workers=2, deadline_s=20.0, memory_mb=512) as pool:
        yield pool


def is_alive(pid: int) -> bool:
    """Whether a process still runs; on Linux one that is dead and only waits to be collected does not count."""
    try:
        os.kill(pid, 0)
        return sys.platform != "linux" or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def start_all(pool: GraderPool) -> None:
    """Grade until every worker has started."""
    for k in itertools.count():
        pool.grade([("x", f"y+{k}")])
        if all(worker.pid for worker in pool._workers):
            return


def processes(pool: GraderPool) -> list[int]:
    assert pool._template is not None
    return [pool._template.pid, *(worker.pid for worker in pool._workers if worker.pid)]


def judge_in_thread(pool: GraderPool, pair: tuple[str, str]) -> tuple[threading.Thread, list[Verdict]]:
    """Start judging one pair; the thread, and the list that will hold its verdict."""
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.extend(pool.grade([pair])))
    thread.start()
    assert eventually(lambda: any(worker.pair == pair for worker in pool._workers))
    return thread, verdicts


def test_verdicts_come_in_the_order_of_the_pairs(pool: GraderPool) -> None:
    pairs = [(f"{k}x^2 - {k}", f"{k}(x-1)(x+1)" if k % 3 else f"{k + 1}x") for k in range(1, 40)]
    expected = [Verdict.CORRECT if k % 3 else Verdict.WRONG for k in range(1, 40)]
    mixed = [pair for k, slow in enumerate(pairs) for pair in (slow, ("7", "7" if k % 2 else None), ("x", "{"))]
    verdicts = pool.grade(mixed)
    assert verdicts[::3] == expected
    assert verdicts[1::3] == [Verdict.CORRECT if k % 2 else Verdict.UNANSWERED for k in range(len(pairs))]
    assert set(verdicts[2::3]) == {Verdict.UNPARSED}


def test_no_process_is_started_for_what_the_fast_path_decides(pool: GraderPool) -> None:
    assert pool.grade([("1/2", "0.5"), ("3", None), (r"\text{east}", "west"), ("4", "\x00"), ("5", "6" * 1_000_000)]) == [
        Verdict.CORRECT,
        Verdict.UNANSWERED,
        Verdict.WRONG,
        Verdict.UNPARSED,
        Verdict.UNPARSED,
    ]
    assert pool._template is None
    assert pool.grade([]) == []


def test_each_pair_is_judged_once(pool: GraderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatched: list[tuple[str, str]] = []
    dispatch = grader_pool.Worker.dispatch

    def count(worker: grader_pool.Worker, pair: tuple[str, str]) -> None:
        dispatched.append(pair)
        dispatch(worker, pair)

    monkeypatch.setattr(grader_pool.Worker, "dispatch", count)
    pairs = [(gold, answer) for gold, answer, _ in GOOD]
    assert pool.grade(pairs * 3) == [verdict for _, _, verdict in GOOD] * 3
    assert pool.grade(pairs) == [verdict for _, _, verdict in GOOD]
    assert sorted(dispatched) == sorted(pairs)


def test_the_cache_is_bounded_and_forgets_the_oldest(pool: GraderPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader_pool, "CACHE_SIZE", 3)
    pairs = [("x", f"x+{k}") for k in range(5)]
    for pair in pairs[:4]:
        pool.grade([pair])
    pool.grade([pairs[1], pairs[4]])  # pairs[1] is used again, so pairs[2] is now the oldest
    assert list(pool._cache) == [pairs[3], pairs[1], pairs[4]]


def test_the_deadline_kills_and_the_pool_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader_pool, "GRACE_S", 60.0)  # it is the pool that kills here, not the worker's own alarm
    with GraderPool(workers=1, deadline_s=0.5, memory_mb=512) as pool:
        pool.grade([("x", "y")])
        first = pool._workers[0].pid
        assert pool.grade([HANGS, HANGS]) == [Verdict.TIMEOUT] * 2
        assert 0.5 <= pool.slowest_s < 1.0
        assert pool.replaced == 1
        assert HANGS not in pool._cache
        assert first is not None
        assert eventually(lambda: not is_alive(first), seconds=2.0)
        assert pool.grade([(gold, answer) for gold, answer, _ in GOOD]) == [verdict for _, _, verdict in GOOD]


def test_a_worker_that_dies_while_judging_is_an_error_and_is_replaced(pool: GraderPool) -> None:
    thread, verdicts = judge_in_thread(pool, HANGS)
    (victim,) = [worker.pid for worker in pool._workers if worker.pair]
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    thread.join(15)
    assert verdicts == [Verdict.ERROR]
    assert pool.replaced == 1
    assert pool.grade([("x^2-1", "(x-1)(x+1)")]) == [Verdict.CORRECT]


def test_what_dies_between_two_calls_costs_no_verdict(pool: GraderPool) -> None:
    for chosen in (slice(1, None), slice(0, 1), slice(0, None)):  # the workers, the template, all of them
        start_all(pool)
        victims = processes(pool)[chosen]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for pid in victims:
            assert eventually(partial(lambda pid: not is_alive(pid), pid))
        pool._cache.clear()
        assert pool.grade([(gold, answer) for gold, answer, _ in GOOD]) == [verdict for _, _, verdict in GOOD]


def test_threads_take_turns(pool: GraderPool) -> None:
    results: dict[int, list[Verdict]] = {}
    threads = [
        threading.Thread(target=lambda k=k: results.update({k: pool.grade([(f"{k}x", f"x*{k}"), (f"{k}x", "y")])})) for k in range(2, 8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [Verdict.CORRECT, Verdict.WRONG] for k in range(2, 8)}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a limit on the address space")
def test_memory_of_a_worker_is_bounded() -> None:
    with GraderPool(workers=1, deadline_s=30.0, memory_mb=256) as pool:
        pool.grade([("x", "y")])
        pid = pool._workers[0].pid
        thread, verdicts = judge_in_thread(pool, ("x+1", r"\operatorname{eye}(9000000)"))  # takes gigabytes where it gets them
        sizes_mb = []
        while thread.is_alive():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                sizes_mb.append(int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize() / 2**20)
            time.sleep(0.02)
        assert verdicts[0] != Verdict.CORRECT
        assert 150 < max(sizes_mb) <= 256
        assert pool.grade([("x^2-1", "(x-1)(x+1)")]) == [Verdict.CORRECT]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_processes_hold_no_torch_and_one_thread(pool: GraderPool) -> None:
    start_all(pool)
    for pid in processes(pool):
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
        assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1


def test_closing_leaves_nothing_behind(pool: GraderPool) -> None:
    start_all(pool)
    pids = processes(pool)
    assert len(pids) == 3
    pool.close()
    assert eventually(lambda: not any(is_alive(pid) for pid in pids))
    with pytest.raises(ValueError, match="closed"):
        pool.grade([("1", "1")])


VICTIM = """
import os, threading, time
from bcr.tasks.grader_pool import GraderPool
from tests.tasks.test_grader_pool import HANGS, processes

def report():
    while sum(worker.pair is not None for worker in pool._workers) < 2:
        time.sleep(0.01)
    loader = os.fork()  # a fork, such as a data loader's, holds copies of the sockets
    if loader == 0:
        time.sleep(60)
        os._exit(0)
    print(loader, *processes(pool), flush=True)

with GraderPool(workers=2, deadline_s=600.0, memory_mb=512) as pool:
    threading.Thread(target=report, daemon=True).start()
    pool.grade([HANGS, (HANGS[0], HANGS[1] + "+1")])
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_at_work_do_not_outlive_their_program(end: signal.Signals) -> None:
    program = subprocess.Popen([sys.executable, "-c", VICTIM], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert program.stdout is not None
    with program.stdout:
        loader, *pids = [int(word) for word in program.stdout.readline().split()]
    try:
        assert len(pids) == 3
        assert all(is_alive(pid) for pid in pids)
        program.send_signal(end)
        program.wait(20)
        assert eventually(lambda: not any(is_alive(pid) for pid in pids))
    finally:
        os.kill(loader, signal.SIGKILL)


def test_an_interrupt_leaves_the_pool_usable(pool: GraderPool) -> None:
    pool.grade([("x", "y")])
    alarm = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        pool.grade([HANGS])
    assert pool._template is None
    assert pool.grade([("x^2-1", "(x-1)(x+1)"), ("2x", "3x")]) == [Verdict.CORRECT, Verdict.WRONG]


def test_a_template_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader_pool, "START_TEMPLATE", "raise SystemExit(3)")
    with GraderPool(workers=1) as pool, pytest.raises(RuntimeError, match="exit status 3"):
        pool.grade([("x", "y")])


PROBE = """
import json, sys
sys.path[:] = json.loads(sys.argv.pop())
import sympy
from bcr.tasks import grader_worker

def probe(gold, answer):
    try:
        return "correct" if sympy.sympify(answer) else "wrong"
    except (TypeError, ValueError):
        return "unparsed"

grader_worker.grade_symbolic = probe
grader_worker.main()
"""


def test_sympy_evaluates_no_text_in_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader_pool, "START_TEMPLATE", PROBE)
    with GraderPool(workers=1) as pool:
        assert pool.grade([("x", "x+1"), ("x", "[1][0]"), ("x", "3/2 ")]) == [Verdict.UNPARSED, Verdict.UNPARSED, Verdict.CORRECT]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"workers": 1, "deadline_s": 0.0}, "deadline_s is 0.0"),
        ({"workers": 1, "memory_mb": 64}, "memory_mb is 64"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, float], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        GraderPool(**arguments)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=20), st.text(st.characters(categories=["Cs", "Cc", "Lu"]), max_size=20))
def test_any_string_survives_the_transport(gold: str, answer: str) -> None:
    message = encode(gold, answer)
    size, rest = LENGTHS.unpack(message[: LENGTHS.size])
    body = message[LENGTHS.size :]
    assert (decode(body[:size]), decode(body[size:]), len(body)) == (gold, answer, size + rest)


def test_one_of_each_hostile_kind_among_good_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_hostile(len(KINDS), 200, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_hostile_strings_among_ten_thousand_good_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_hostile(1_000, 10_000, tmp_path, monkeypatch)


def check_hostile(num_hostile: int, num_good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good pairs are judged right, hostile ones never correct, in time, and no code in them runs."""
    monkeypatch.chdir(tmp_path)
    good = [
        (f"{k}({gold})", f"{k}({answer})", verdict) for k, (gold, answer, verdict) in zip(range(2, num_good + 2), itertools.cycle(GOOD[:2]))
    ]
    bad = [
        (gold, answer, None) for gold, answer in zip(itertools.cycle(["x+1", "7", r"\sqrt{2}"]), itertools.islice(hostile(), num_hostile))
    ]
    every = num_good // num_hostile
    rows = [row for k, evil in enumerate(bad) for row in (*good[k * every : (k + 1) * every], evil)] + good[num_hostile * every :]
    with GraderPool(workers=2, deadline_s=0.5, memory_mb=512) as pool:
        start_all(pool)
        start = time.monotonic()
        verdicts = pool.grade([(gold, answer) for gold, answer, _ in rows])
        seconds = time.monotonic() - start
        assert pool.slowest_s < 1.0
    assert [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if row[2] and row[2] != verdict] == []
    counts = Counter(verdict for row, verdict in zip(rows, verdicts, strict=True) if row[2] is None)
    assert counts[Verdict.CORRECT] == 0
    assert counts[Verdict.TIMEOUT] > 0
    assert counts[Verdict.UNPARSED] > 0
    assert list(tmp_path.glob(f"*{TRACE}*")) == []
    assert list(tmp_path.iterdir()) == []
    assert seconds < 600
