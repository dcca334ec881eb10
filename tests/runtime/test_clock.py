"""Seconds of a phase everywhere, and where CUDA is (here a stand-in) the peak of that phase alone."""

import pytest
import torch

from bcr.runtime.clock import Clock


def test_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with clock("grading"):
        pass
    assert set(clock.seconds) == {"seconds_grading"}
    if not torch.cuda.is_available():
        assert clock.peaks == {}
    peak = [3 * 2**30]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    with clock("sampling"):
        peak[0] = 5 * 2**20
    with clock("learning"):
        peak[0] = 7 * 2**20
    assert clock.peaks == {"peak_mb_sampling": 5.0, "peak_mb_learning": 7.0}
    assert set(clock.seconds) == {"seconds_grading", "seconds_sampling", "seconds_learning"}
    assert all(seconds >= 0 for seconds in clock.seconds.values())
