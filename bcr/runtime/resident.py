"""The most memory that this process has held since a moment: Linux' high-water mark of its resident set, which may be set back."""

from __future__ import annotations

from pathlib import Path

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
ONLY_THE_MARK = "5"  # proc(5): no page is touched, so it takes some 50 microseconds whatever the process holds


def restart_peak() -> bool:
    """Set the mark back to what the process holds now; False where the system does not let it (not Linux, a closed /proc)."""
    try:
        RESET.write_text(ONLY_THE_MARK)
    except OSError:
        return False
    return STATUS.exists()


def peak_mb() -> float:
    """MiB at the mark."""
    return next(int(line.split()[1]) / 2**10 for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
