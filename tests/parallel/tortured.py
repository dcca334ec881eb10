"""The training program, telling of every phase that it enters in the file that PHASES names. For torchrun."""

import os
import time
from collections.abc import Callable
from typing import Any

from bcr import train
from bcr.runtime.config import launch
from bcr.runtime.schema import TrainConfig
from tests.runtime.torture import PHASES


def announced(name: str, function: Callable[..., Any], tell: Callable[[str], None]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tell(name)
        return function(*args, **kwargs)

    return wrapper


if __name__ == "__main__":
    file = os.open(os.environ["PHASES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(phase: str) -> None:
        os.write(file, f"{time.monotonic()} {os.environ['RANK']} {os.getpid()} {phase}\n".encode())

    tell("started")
    for name, (owner, attribute) in PHASES.items():
        setattr(owner, attribute, announced(name, getattr(owner, attribute), tell))
    launch("train", TrainConfig, train.prepare, train.main, ranks=True)
