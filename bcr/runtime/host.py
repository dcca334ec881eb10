"""The machine under the run: device, threads, the C allocator."""

from __future__ import annotations

import ctypes
import os
import sys

import torch


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is a GPU, else the CPU. ValueError for a GPU that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {name!r}; it must be 'auto', 'cpu' or 'cuda'.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no GPU here; use device=cpu or device=auto.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settle_in(threads: int | None, processes: int = 1) -> None:
    """Fix the thread count (part of what makes a CPU run repeatable) and keep freed memory in the process.

    Without `threads` the cores are split among the run's `processes` on this machine; torch does that for one.

    glibc gives every large block back to the system at once and a CPU training step asks for thousands of them; the page faults cost
    10 to 60 % of the step. `bench/train_step.py` shows it on your machine.
    """
    if threads is None and processes > 1:
        threads = max(1, cores() // processes)
    if threads is not None:
        torch.set_num_threads(threads)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
        if mallopt is not None:
            m_trim_threshold, m_mmap_threshold, gigabyte = -1, -3, 2**30
            mallopt(m_mmap_threshold, gigabyte)
            mallopt(m_trim_threshold, 2 * gigabyte - 1)
