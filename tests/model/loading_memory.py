"""Run as a program: load the checkpoint in argv[1] as argv[2], print the growth of the peak resident memory and the size of the weights."""

import sys
from pathlib import Path

import torch

from bcr.model import load_pretrained


def peak() -> int:
    """From /proc: what getrusage says begins with the parent's."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    load_pretrained(Path(path) / "tiny", dtype=dtype)  # so that what torch imports at first use is there
    before = peak()
    model = load_pretrained(path, dtype=dtype)
    print(peak() - before, sum(parameter.nbytes for parameter in model.parameters()))
