"""How long it will still take: an estimate from declared costs, corrected by the pace so far."""

from __future__ import annotations

PRIOR = 10.0  # seconds of declared work that the declaration itself is worth as evidence


def seconds_left(total: float, done: float, elapsed: float) -> float:
    """Seconds that the rest of the work will take.

    `total` and `done` are declared costs: of everything, and of what is finished [seconds on the machine they were measured on]; `elapsed`
    is how long the finished part took here. This machine's pace is elapsed / done, drawn towards 1 while little is done.

    >>> seconds_left(total=100, done=0, elapsed=0)  # nothing is known yet but the declaration
    100.0
    >>> seconds_left(total=100, done=40, elapsed=90)  # twice as slow as declared
    120.0
    """
    pace = (PRIOR + elapsed) / (PRIOR + done)
    return max(0.0, total - done) * pace


def spoken(seconds: float) -> str:
    """Rounded as one would say it.

    >>> [spoken(seconds) for seconds in (3.2, 44, 61, 340)]
    ['5 s', '45 s', '1 min', '5 min 40 s']
    """
    if seconds < 60:
        return f"{max(5, 5 * round(seconds / 5))} s"
    minutes, rest = divmod(10 * round(seconds / 10), 60)
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"
