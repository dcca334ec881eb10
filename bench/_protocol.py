"""How the head's benches measure: fixed work, warm-up, the median of several rounds, peers in the same rounds, the limit beside it.

Seconds are wall time between two device synchronisations. Memory is the peak above what stood before the call, less the gradients that
the call returns; on a CPU it is the rise of the resident set (Linux). The matmul peak is the rate of one square product in the dtype of
the run: the limit that no path can beat without doing less work.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measurement:
    """seconds: the median. bytes: peak beyond returned gradients. error: max |delta log-prob| against float64, None where there is none."""

    name: str
    what: str
    seconds: float
    bytes: int
    share_of_peak: float
    error: float | None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of one product, the fastest of ten, for it serves as a limit: 8192 cubed on CUDA, 2048 cubed on a CPU."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b), device) for _ in range(10))


def copy_rate(device: str) -> float:
    """Bytes read and written per second by one large copy, the fastest of ten: 2 GiB on CUDA, 256 MiB on a CPU."""
    source = torch.ones(1 << (31 if device == "cuda" else 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(10))


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Wall time of one call, between two device synchronisations."""
    _synchronise(device)
    begun = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - begun


def peak_bytes(run: Callable[[], Any], leaves: list[Tensor], device: str) -> int:
    """Peak memory of one call beyond the gradients it leaves in `leaves`."""
    for leaf in leaves:
        leaf.grad = None
    _synchronise(device)
    before = _reset_peak(device)
    run()
    _synchronise(device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _resident_peak()
    return max(0, peak - before - sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None))


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> int:
    """Start a new high-water mark; returns where it starts."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc: what the allocator kept goes back to the system
        if trim is not None:
            trim(0)
        clear.write_text("5")
    return _resident_peak()


def _resident_peak() -> int:
    """Bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


@dataclass(frozen=True)
class Contender:
    """One thing to measure. `flop` is the arithmetic that the task cannot avoid; gradients are left in `leaves`."""

    name: str
    what: str
    run: Callable[[], Any]
    leaves: list[Tensor]
    flop: float
    error: float | None


def measure(contenders: list[Contender], *, peak: float, device: str, repeats: int) -> list[Measurement]:
    """One warm-up each, then `repeats` rounds in which everybody runs once, so that a slow minute of the machine hits all alike.

    share_of_peak is the time of `flop` at `peak` over the median time taken.
    """
    for contender in contenders:
        contender.run()
    memory = [peak_bytes(contender.run, contender.leaves, device) for contender in contenders]
    rounds = [[once(contender, device) for contender in contenders] for _ in range(repeats)]
    medians = [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]
    return [
        Measurement(c.name, c.what, seconds, held, c.flop / peak / seconds, c.error)
        for c, seconds, held in zip(contenders, medians, memory, strict=True)
    ]


def once(contender: Contender, device: str) -> float:
    for leaf in contender.leaves:
        leaf.grad = None
    return seconds_of(contender.run, device)


def print_rows(results: list[Measurement]) -> None:
    for result in results:
        error = "" if result.error is None else f"{result.error:.1e}"
        line = f"  {result.name:34} {result.what:20} {result.seconds * 1e3:10.2f} ms {result.bytes / 1e6:9.1f} MB"
        print(f"{line} {100 * result.share_of_peak:6.1f} %  {error}", flush=True)


def print_header(title: str) -> None:
    print(f"\n{title}\n  {'':34} {'':20} {'time':>13} {'memory':>12} {'peak':>8}  max |dlogprob|", flush=True)


def print_json(bench: str, device: str, dtype: torch.dtype, peak: float, cases: list[dict[str, Any]]) -> None:
    """The last line: everything measured, with versions."""
    record = {
        "bench": bench,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_peak_flops": peak,
        "cases": [case | {"results": [asdict(result) for result in case["results"]]} for case in cases],
    }
    print(json.dumps(record))
