"""Who runs in the next step: prompts are prefilled in chunks beside the decoding rows, forked to their rollouts, and give way when
blocks run out.

Positions advance by one a step whatever is sampled, so the scheduler plans a step without having seen the tokens of the last one.
Only a preemption must know them; it asks for them (`drain`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bcr.records import Request
from bcr.sampler.blocks import BlockAllocator

Copy = tuple[int, int, int]  # (source block, target block, how many tokens of it)
LIKE = 64  # contexts that differ by less are of like length


@dataclass(eq=False)
class Draft:
    """One rollout being written. `cached`: how many of its tokens have keys and values in `blocks`, the step under way included."""

    request: Request
    index: int
    key: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def spent(self) -> bool:
        """Whether the steps under way use up its budget."""
        return self.cached >= len(self.request.prompt_ids) + self.request.max_new_tokens - 1


@dataclass(eq=False)
class Family:
    """A prompt and the drafts that start from it. All of it but the last token is prefilled; each draft decodes that one itself."""

    prompt_ids: list[int]
    waiting: deque[Draft]
    blocks: list[int] | None = None
    prefilled: int = 0

    @property
    def prefix(self) -> int:
        return len(self.prompt_ids) - 1

    @property
    def ready(self) -> bool:
        return self.blocks is not None and self.prefilled == self.prefix


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. start + len(token_ids) - 1 of a prompt, to be prefilled into `blocks`."""

    token_ids: list[int]
    start: int
    blocks: list[int]


@dataclass(frozen=True)
class Plan:
    """A step: first `forks`, then `moves`, blocks to copy; then one token for each of `live`, and `chunks`.

    Nothing of the last two means that the tokens of the steps under way must be read first.
    """

    forks: list[Copy]
    moves: list[Copy]
    live: list[Draft]
    chunks: list[Chunk]


class Scheduler:
    """At most `max_rows` drafts decode at once and at most `step_tokens` tokens go through the model in a step, decoding ones first.

    Requests with the largest budgets start first, which shortens the tail in which few rows are left. `in_place`: where a block holds a
    whole request, keep those in use together, for a path that reads them in few pieces; where there are rows for all at once, the
    shortest prompts start first, so that neighbours have contexts of like length.
    """

    def __init__(
        self, families: Sequence[Family], allocator: BlockAllocator, *, max_rows: int, step_tokens: int, in_place: bool = True
    ) -> None:
        together = in_place and sum(len(family.waiting) for family in families) <= max_rows
        key = (lambda family: family.prefix) if together else (lambda family: -family.waiting[0].request.max_new_tokens)
        self.queue = deque(sorted(families, key=key))
        self.allocator, self.max_rows, self.step_tokens = allocator, max_rows, step_tokens
        longest = max(len(family.prompt_ids) + family.waiting[0].request.max_new_tokens for family in families)
        self.in_place = in_place and allocator.needed(longest) == 1
        self.live: list[Draft] = []
        self.preemptions = self.steps = 0

    @property
    def done(self) -> bool:
        return not self.live and not self.queue

    def schedule(self, drain: Callable[[], None]) -> Plan:
        """The next step. `drain()` waits for the tokens of the steps under way; finished drafts leave meanwhile."""
        self.steps += 1
        forks = self._seat()
        self._grow(drain)
        moves = [] if self.queue or not self.in_place else self._compact()
        chunks = self._prefill()
        rows = [draft for draft in self.live if not draft.spent]
        for draft in rows:
            draft.cached += 1
        if self.in_place:
            rows.sort(key=lambda draft: draft.blocks[0])
        return Plan(forks, moves, rows, chunks)

    def finish(self, draft: Draft) -> None:
        self.live.remove(draft)
        self.allocator.release(draft.blocks)
        draft.blocks = []

    def _seat(self) -> list[Copy]:
        """Fork the drafts of prefilled prompts, in order, while rows and blocks last; returns the blocks to copy."""
        copies: list[Copy] = []
        while self.queue and len(self.live) < self.max_rows:
            family = self.queue[0]
            if not family.ready and (family.prefix > 0 or not self._started(family)):
                break
            assert family.blocks is not None
            if len(family.waiting) == 1 and family.prefix:
                blocks, family.blocks = family.blocks, None  # the last one takes the prompt's own blocks
            else:
                fork = self._forked(family)
                if fork is None:
                    break
                blocks, pair = fork
                copies += [(*pair, family.prefix % self.allocator.block_size)] if pair else []
            draft = family.waiting.popleft()
            draft.blocks, draft.cached = blocks, family.prefix
            self.live.append(draft)
            if not family.waiting:
                self.queue.popleft()
        return copies

    def _forked(self, family: Family) -> tuple[list[int], tuple[int, int] | None] | None:
        """Blocks for one more draft of the family; None where it must wait."""
        assert family.blocks is not None
        if self.live and self.allocator.free <= self._headroom():
            return None
        while (fork := self._copied(family)) is None and not self.live:
            if not self._evict(behind=family):  # it has the cache to itself: the draft takes the blocks, the others prefill anew
                blocks, family.blocks, family.prefilled = family.blocks, None, 0
                return blocks, None
        return fork

    def _copied(self, family: Family) -> tuple[list[int], tuple[int, int] | None] | None:
        """The allocator's fork; where there is no prefix, the block of the first token."""
        assert family.blocks is not None
        if family.prefix:
            return self.allocator.fork(family.blocks, family.prefix)
        block = self.allocator.allocate(1)
        return None if block is None else (block, None)

    def _headroom(self) -> int:
        """Blocks kept back so that what already runs can go on a while; none where a block holds a whole request."""
        return 0 if self.in_place else len(self.live)

    def _grow(self, drain: Callable[[], None]) -> None:
        """Room for one more token of every live draft; the youngest make room where blocks run out."""
        for draft in list(self.live):
            while self.allocator.needed(draft.cached + 1) > len(draft.blocks) and not draft.spent and draft in self.live:
                block = self.allocator.allocate(1)
                if block is not None:
                    draft.blocks += block
                elif not self._evict(behind=None):
                    drain()
                    if self.allocator.free == 0 and draft in self.live:
                        self._preempt(self.live[-1])

    def _compact(self) -> list[Copy]:
        """Move drafts so that the blocks in use lie together, shorter contexts below longer ones, up to LIKE; few of each length move."""
        if self.allocator.packed:
            return []
        lengths: dict[int, list[Draft]] = {}
        for draft in self.live:
            lengths.setdefault((draft.cached - self.steps) // LIKE, []).append(draft)  # the same number as long as a draft runs
        moves: list[Copy] = []
        first = 0
        for _, alike in sorted(lengths.items()):
            theirs = range(first, first := first + len(alike))
            gaps = set(theirs) - {draft.blocks[0] for draft in alike}
            for draft in alike:
                if draft.blocks[0] not in theirs:
                    moves.append((draft.blocks[0], gaps.pop(), draft.cached))
                    draft.blocks = [moves[-1][1]]
        self.allocator.pack()
        return moves

    def _preempt(self, draft: Draft) -> None:
        """Take its blocks; it will prefill its prompt and all that it has written, and go on."""
        self.live.remove(draft)
        self.allocator.release(draft.blocks)
        draft.blocks = []
        self.queue.appendleft(Family([*draft.request.prompt_ids, *draft.token_ids], deque([draft])))
        self.preemptions += 1

    def _evict(self, behind: Family | None) -> bool:
        """Drop the prefilled prompt that is last in the queue (and not `behind` itself); False where there is none."""
        for family in reversed(self.queue):
            if family is not behind and family.blocks:
                self.allocator.release(family.blocks)
                family.blocks, family.prefilled = None, 0
                return True
        return False

    def _prefill(self) -> list[Chunk]:
        """Chunks of the prompts whose drafts sit down next, in order, up to the step's tokens."""
        chunks: list[Chunk] = []
        room, seats = self.step_tokens - len(self.live), self.max_rows - len(self.live)
        for family in self.queue:
            if seats <= 0 or not self._started(family):
                break
            assert family.blocks is not None
            count = min(max(0, room), family.prefix - family.prefilled)
            if count:
                stop = family.prefilled + count
                chunks.append(Chunk(family.prompt_ids[family.prefilled : stop], family.prefilled, family.blocks))
                family.prefilled, room = stop, room - count
            seats -= len(family.waiting)
        return chunks

    def _started(self, family: Family) -> bool:
        """Whether the family has blocks for its prompt, given now if they are free."""
        if family.blocks is None:
            needed = self.allocator.needed(family.prefix)
            if self.live and self.allocator.free < needed + self._headroom():
                return False
            while (blocks := self.allocator.allocate(needed)) is None:
                if self.live or family is not self.queue[0] or not self._evict(behind=family):
                    return False
            family.blocks = blocks
        return True
