"""What a training step costs: `python -m bench.train_step [rl] [demo] [learner] [repeats=3] [micro_batch=64]`.

    rl        a whole RL step on fixed prompts and lengths, on a CPU; TRL's GRPOTrainer in the same run where trl and accelerate can be
              imported, each library in a process of its own with its peak resident set (`bench/_rl_step.py` says what the work is)
    demo      a step of the demo's training on a CPU, by phase, with a profile
    learner   one update from packs of 16,384 tokens in the shape of Qwen3-0.6B, with MFU: for CUDA

Without a name: rl and demo, or where CUDA is, learner. Limits are the multiply-adds that cannot be avoided (each prompt
once, in learning too) over the matmul rate measured in the same run.
`micro_batch`: the rollouts of one of TRL's passes. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from bcr.runtime.host import settle_in
from bench._learner_step import learner
from bench._protocol import default_device
from bench._rl_step import compare


def demo(repeats: int) -> dict[str, Any]:
    from bench._demo_step import demo  # takes the whole trainer; the others run where torch and triton are

    return demo(repeats)


def main(*arguments: str) -> None:
    options = {"repeats": 3, "micro_batch": 64} | {name: int(value) for name, _, value in (a.partition("=") for a in arguments) if value}
    asked = [argument for argument in arguments if "=" not in argument] or (["learner"] if default_device() == "cuda" else ["rl", "demo"])
    settle_in(None)
    workloads = {
        "rl": lambda: compare(options["repeats"], options["micro_batch"]),
        "demo": lambda: demo(options["repeats"]),
        "learner": lambda: learner(default_device(), options["repeats"]),
    }
    results = {name: workloads[name]() for name in asked}
    print(json.dumps({"bench": "train_step", "threads": torch.get_num_threads(), "torch": torch.__version__, **results}))


if __name__ == "__main__":
    main(*sys.argv[1:])
