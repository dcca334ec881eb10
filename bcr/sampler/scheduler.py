"""Which rollouts run: groups wait in order, slots are filled as others finish, and live slots stay together at the front."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bcr.records import Request, Rollout
from bcr.sampler.sampling import row_key


@dataclass(eq=False)
class Group:
    """One request and its n rollouts. `prefix` is its prompt's keys and values, kept while rollouts of it still wait."""

    request: Request
    n: int
    waiting: int
    prefix: list[tuple[Tensor, Tensor]] | None = None
    rollouts: dict[int, Rollout] = field(default_factory=dict)


class Slots:
    """The state of every slot as [slots] tensors on the device, and on the host who sits where."""

    def __init__(self, slots: int, max_new_tokens: int, device: torch.device) -> None:
        self.owners: list[tuple[Group, int]] = []  # (group, sample index) of the live slots 0 .. len(owners)
        self.token = torch.zeros(slots, dtype=torch.int64, device=device)  # the next input
        self.position = torch.zeros(slots, dtype=torch.int64, device=device)  # where it stands in the sequence
        self.generated = torch.zeros(slots, dtype=torch.int64, device=device)
        self.limit = torch.zeros(slots, dtype=torch.int64, device=device)
        self.key = torch.zeros(slots, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(slots, max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(slots, max_new_tokens, dtype=torch.float32, device=device)

    def admit(self, group: Group, count: int, seed: int) -> slice:
        """Seat `count` more rollouts of the group behind the live ones; returns their slots."""
        first = len(self.owners)
        taken = slice(first, first + count)
        begun = group.n - group.waiting
        self.owners += [(group, begun + k) for k in range(count)]
        self.token[taken] = group.request.prompt_ids[-1]
        self.position[taken] = len(group.request.prompt_ids) - 1
        self.generated[taken] = 0
        self.limit[taken] = group.request.max_new_tokens
        self.key[taken] = torch.tensor([row_key(seed, group.request.id, begun + k) for k in range(count)], device=self.key.device)
        group.waiting -= count
        return taken

    def record(self, tokens: Tensor, logprobs: Tensor, stop_token_ids: Tensor) -> list[int]:
        """Note one new token for each live slot; returns the slots that are finished by it."""
        live = torch.arange(len(self.owners), device=tokens.device)
        self.tokens[live, self.generated[live]] = tokens
        self.logprobs[live, self.generated[live]] = logprobs
        self.token[live] = tokens
        self.position[live] += 1
        self.generated[live] += 1
        done = torch.isin(tokens, stop_token_ids) | (self.generated[live] >= self.limit[live])
        return done.nonzero().squeeze(1).tolist()

    def rollout(self, slot: int, stop_token_ids: Sequence[int], policy_version: int) -> Rollout:
        length = int(self.generated[slot])
        tokens = self.tokens[slot, :length].tolist()
        finish: Literal["stop", "length"] = "stop" if tokens[-1] in stop_token_ids else "length"
        return Rollout(self.owners[slot][0].request.id, tokens, self.logprobs[slot, :length].tolist(), finish, policy_version)

    def leave(self, finished: list[int]) -> tuple[Tensor, Tensor]:
        """Close the gaps: returns (sources, targets), the slots that moved, for the cache to follow. Freed slots are left inert."""
        gone = set(finished)
        left = len(self.owners) - len(gone)
        targets = [slot for slot in finished if slot < left]
        sources = [slot for slot in range(left, len(self.owners)) if slot not in gone]
        for source, target in zip(sources, targets, strict=True):
            self.owners[target] = self.owners[source]
        del self.owners[left:]
        source_ids, target_ids = (torch.tensor(ids, dtype=torch.int64, device=self.token.device) for ids in (sources, targets))
        for state in (self.token, self.position, self.generated, self.limit, self.key, self.tokens, self.logprobs):
            state[target_ids] = state[source_ids]
        self.token[left:] = 0
        self.position[left:] = 0
        return source_ids, target_ids


class Scheduler:
    """First come, first served; the rollouts of a group sit down together as far as there is room."""

    def __init__(self, requests: Sequence[Request], n: int) -> None:
        self.groups = [Group(request, n, waiting=n) for request in requests]
        self.queue = deque(self.groups)

    def next_admission(self, free: int) -> tuple[Group, int] | None:
        """(group, how many of its rollouts) to seat now; None when nobody waits or there is no room."""
        while self.queue and self.queue[0].waiting == 0:
            self.queue.popleft().prefix = None
        if not self.queue or free == 0:
            return None
        return self.queue[0], min(free, self.queue[0].waiting)
