"""Which blocks of the KV cache are whose: reference counts, forks, the lowest free block first. `kv_cache.py` has the bytes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


class BlockAllocator:
    """Blocks 0 .. count-1. A block is free when nobody refers to it; several sequences may refer to one that none of them writes to."""

    def __init__(self, count: int, block_size: int) -> None:
        self.count, self.block_size = count, block_size
        self.references = [0] * count
        self._free = list(range(count))  # a heap: low blocks are used first, so that those in use lie together

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, length: int) -> int:
        """How many blocks hold `length` tokens."""
        return -(-length // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks, or None, and nothing taken, where so many are not free."""
        if count > self.free:
            return None
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self.references[block] = 1
        return blocks

    def fork(self, blocks: Sequence[int], length: int) -> tuple[list[int], tuple[int, int] | None] | None:
        """A second sequence with the same first `length` tokens: (its blocks, the (source, target) of the tail to copy or None).

        Full blocks are shared; the last one is copied where it is not full, for both will write to it. None where no block is free for it.

        >>> allocator = BlockAllocator(8, block_size=4)
        >>> allocator.fork(allocator.allocate(3), length=9)
        ([0, 1, 3], (2, 3))
        """
        full = length // self.block_size
        tail = self.allocate(self.needed(length) - full)
        if tail is None:
            return None
        for block in blocks[:full]:
            self.references[block] += 1
        return [*blocks[:full], *tail], (blocks[full], tail[0]) if tail else None

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each of the blocks."""
        for block in blocks:
            assert self.references[block] > 0, f"block {block} is free already"
            self.references[block] -= 1
            if self.references[block] == 0:
                heapq.heappush(self._free, block)

    @property
    def packed(self) -> bool:
        """Whether no free block lies below one in use."""
        return not self._free or self._free[0] >= self.count - self.free

    def pack(self) -> None:
        """Their holders have moved into the lowest blocks, where none is shared."""
        assert max(self.references) <= 1, "shared blocks cannot move"
        used = self.count - self.free
        self.references = [1] * used + [0] * self.free
        self._free = list(range(used, self.count))
