"""The processes behind `bcr.tasks.grader_pool`: a template that has the libraries loaded, and the workers it forks.

The template is a fresh interpreter, never a fork of the trainer, so it holds neither torch nor threads and forking it is safe and
quick. It only waits: for an order to fork or to kill, or for the pool's process to vanish, whereupon it kills its workers.
A worker judges one pair at a time, under a memory limit, and cannot outlive its work: an alarm of the kernel ends it even
when nobody is left to kill it.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any, NoReturn

from bcr.records import Verdict
from bcr.tasks.grading import grade_symbolic

VERDICTS = tuple(Verdict)  # on the wire a verdict is its index here
ORDER = struct.Struct("!cI")  # to the template: FORK (with the worker's socket), or KILL and a process id
FORK, KILL = b"F", b"K"
HELLO = struct.Struct("!I")  # from a new worker: its process id
LENGTHS = struct.Struct("!II")  # to a worker: bytes of gold, bytes of answer, then both

WARM_UP = [
    (r"\frac{\sqrt{3}}{2}", r"\frac{3}{2\sqrt{3}}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    (r"(-\infty, 2) \cup [3, 5]", r"(-\infty,2)\cup(3,5]"),
    (r"x^2 + 2x - 1", r"(x+1)^2 - 2"),
    (r"\begin{pmatrix} 1 & -2 \\ 0 & 3 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 0 & 3 \end{pmatrix}"),
    (r"y = 2x + 3", r"2x - y + 3 = 0"),
    (r"1, 2, \text{ and } 3", r"\{3, 2, 1\}"),
    (r"e^{-2t} \sin(3t)", r"\binom{5}{2} + 2!"),
    (r"3 \pm 2\sqrt{2}", r"x \le 5"),
]


def run_template(control_fd: int, parent_pid: int, memory_mb: int, patience_s: float) -> None:
    """Obey orders from the pool until its end of the control socket closes or its process is gone; then leave nothing behind."""
    control = socket.socket(fileno=control_fd)
    for gold, answer in WARM_UP:  # the parser's tables fill as it is used: workers inherit them full
        grade_symbolic(gold, answer)
    forbid_evaluation()
    gc.collect()
    gc.freeze()
    children: set[int] = set()
    try:
        while os.getppid() == parent_pid:
            if not select.select([control], [], [], 1.0)[0]:
                continue
            order, fds, _, _ = socket.recv_fds(control, ORDER.size, 1)
            if len(order) < ORDER.size:
                break
            kind, pid = ORDER.unpack(order)
            if kind == FORK:
                children.add(fork_worker(control, fds[0], memory_mb, patience_s))
            elif pid in children:
                children.remove(pid)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def forbid_evaluation() -> None:
    """Close the door through which sympy turns text into code, `sympify` of a string: from here on it reads plain fractions alone.

    No answer gets there, for the grammar builds objects; this keeps it so whatever a library does. (Its own tables hold texts like "3/2".)
    """
    sympy: Any = importlib.import_module("sympy")
    parser: Any = importlib.import_module("sympy.parsing.sympy_parser")

    def refuse(*_: object) -> NoReturn:
        raise ValueError("text is not evaluated in a grader process")

    parser.parse_expr = lambda text, *_, **__: sympy.Rational(text)
    parser.eval_expr = refuse


def fork_worker(control: socket.socket, fd: int, memory_mb: int, patience_s: float) -> int:
    """Fork one worker that talks over socket `fd`; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            control.close()
            serve(socket.socket(fileno=fd), memory_mb, patience_s)
        finally:  # also where an error escapes (out of memory, too deep): the pool sees the socket close
            os._exit(0)
    os.close(fd)
    return pid


def serve(connection: socket.socket, memory_mb: int, patience_s: float) -> None:
    """Judge pairs one after the other until the pool's end closes."""
    limit_memory(memory_mb)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends a process whose alarm nobody handles
    connection.sendall(HELLO.pack(os.getpid()))
    while lengths := receive(connection, LENGTHS.size):
        gold_bytes, answer_bytes = LENGTHS.unpack(lengths)
        gold, answer = decode(receive(connection, gold_bytes)), decode(receive(connection, answer_bytes))
        signal.setitimer(signal.ITIMER_REAL, patience_s)
        verdict = grade_symbolic(gold, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(bytes([VERDICTS.index(verdict)]))


def limit_memory(memory_mb: int) -> None:
    """Cap the address space of this process (where the system enforces that: Linux does, macOS does not), and leave no core files."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, or fewer where the other end has closed."""
    data = b""
    while len(data) < size and (piece := connection.recv(size - len(data))):
        data += piece
    return data


def encode(gold: str, answer: str) -> bytes:
    """A pair on the wire. Any string survives, lone surrogates and null bytes too."""
    parts = [text.encode("utf-8", "surrogatepass") for text in (gold, answer)]
    return LENGTHS.pack(*map(len, parts)) + b"".join(parts)


def decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def main() -> NoReturn:
    control_fd, parent_pid, memory_mb, patience_s = sys.argv[1:5]
    run_template(int(control_fd), int(parent_pid), int(memory_mb), float(patience_s))
    sys.exit(0)
