"""Seconds of a phase, and the peak of that phase alone: of the resident set, or where CUDA is (here a stand-in) of its tensors."""

import mmap
from pathlib import Path

import pytest
import torch

from bcr.runtime import resident
from bcr.runtime.clock import Clock


def test_phases_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, peak = Clock("cuda"), [3 * 2**30]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    with clock("sampling"):
        peak[0] = 5 * 2**20
    with clock("learning"):
        peak[0] = 7 * 2**20
    assert clock.peaks == {"peak_mb_sampling": 5.0, "peak_mb_learning": 7.0}
    assert set(clock.seconds) == {"seconds_sampling", "seconds_learning"}
    assert all(seconds >= 0 for seconds in clock.seconds.values())


@pytest.mark.skipif(not resident.restart_peak(), reason="the system does not tell the peak of the resident set")
def test_a_phase_has_its_own_peak_and_not_that_of_the_one_before() -> None:
    clock, held = Clock(), 128
    with clock("sampling"), mmap.mmap(-1, held << 20) as memory:  # not malloc, which may keep what is freed
        memory.write(b"1" * (held << 20))
    with clock("grading"):
        pass
    assert set(clock.peaks) == {"peak_mb_sampling", "peak_mb_grading"}
    assert clock.peaks["peak_mb_sampling"] - clock.peaks["peak_mb_grading"] > 0.9 * held


def test_where_the_system_does_not_tell_there_is_no_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resident, "RESET", tmp_path / "no_such_folder" / "clear_refs")
    clock = Clock()
    with clock("sampling"):
        pass
    assert set(clock.seconds) == {"seconds_sampling"}
    assert clock.peaks == {}
