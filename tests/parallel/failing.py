"""The training program with a fault planted: on rank 1 judging raises in the second step. For torchrun."""

import itertools
import os
import time
from typing import Any

from bcr import train
from bcr.runtime.config import launch
from bcr.runtime.schema import TrainConfig

calls = itertools.count(1)
judge = train.judge


def failing(*args: Any) -> Any:
    if os.environ["RANK"] == "1" and next(calls) == 2:
        print("raising at", time.time(), flush=True)
        raise KeyError("planted")
    return judge(*args)


if __name__ == "__main__":
    train.judge = failing
    launch("train", TrainConfig, train.prepare, train.main, ranks=True)
