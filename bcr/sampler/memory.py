"""How large the cache of the paged path is, and whose its memory is while the learner learns."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch

HOST_MB = 2048  # of a cache in host memory, where `cache_mb` is None
ALONE, LENT, KEPT = 0.9, 0.8, 0.5  # share of the free memory: without a learner; with one that borrows it; with one that works beside it

_numbers = itertools.count()


class Saver(Protocol):
    """What is used of `torch_memory_saver`: tensors made in a region lose their memory and get other memory at the same addresses."""

    def region(self, tag: str) -> AbstractContextManager[None]: ...
    def pause(self, tag: str) -> None: ...
    def resume(self, tag: str) -> None: ...


@functools.cache
def find_saver() -> Saver | None:
    """`torch_memory_saver`, where it is installed; it cannot work with expandable segments."""
    expandable = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if expandable or importlib.util.find_spec("torch_memory_saver") is None:
        return None
    from torch_memory_saver import torch_memory_saver

    torch_memory_saver.hook_mode = "torch"  # by torch's allocator interface: nothing has to be preloaded
    saver: Saver = torch_memory_saver
    return saver


def cache_share(learner_bytes: int, saver: bool) -> float:
    """Of the memory that is free when sampling begins. `learner_bytes`: what a learner in this process is still going to take and keep."""
    if not learner_bytes:
        return ALONE
    return LENT if saver else KEPT


def cache_bytes(free: int, step: int, learner_bytes: int, share: float) -> int:
    """Bytes for the cache: a share of what is free, less what a step needs at its peak and what the learner will take and keep.

    >>> cache_bytes(free=60, step=4, learner_bytes=16, share=0.5)
    20
    """
    return max(0, int(share * (free - step - learner_bytes)))


def block_count(bytes_for_cache: int, bytes_per_block: int, rows: int, blocks_per_row: int) -> int:
    """How many blocks: what the bytes hold, but no more than `rows` rollouts as long as the context, and a prompt, could use."""
    return min(bytes_for_cache // bytes_per_block, (rows + 1) * blocks_per_row)


@dataclass
class Loan:
    """The cache's memory, which the learner has between calls of `generate`. The addresses stay, so captured graphs stay valid.

    Without a saver nothing is lent: the cache keeps its share.
    """

    saver: Saver | None
    lent: bool = False
    tag: str = field(default_factory=lambda: f"bcr-kv-cache-{next(_numbers)}")

    def region(self) -> AbstractContextManager[None]:
        """In it the cache's tensor is made."""
        self.lent = False
        return self.saver.region(self.tag) if self.saver else nullcontext()

    def lend(self, memory: torch.Tensor) -> None:
        if self.saver and not self.lent:
            if memory.is_cuda:
                torch.cuda.synchronize(memory.device)  # steps under way still read it
            self.saver.pause(self.tag)
            self.lent = True

    def take_back(self, memory: torch.Tensor) -> None:
        if self.saver and self.lent:
            if memory.is_cuda:
                torch.cuda.empty_cache()  # what the learner does not use any more
            self.saver.resume(self.tag)
            memory.zero_()  # what lies there is another's; masked places must be finite
            self.lent = False


def peak_of(work: object, device: torch.device) -> int:
    """Bytes that `work()` takes on a CUDA device beyond what is allocated before it, at its peak."""
    assert callable(work)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
