"""The decoding rows of the paged path, in buffers that keep their addresses: graphs read and write them, the host sends only changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bcr.sampler.batch import upload
from bcr.sampler.scheduler import Draft

FIELDS = ("token", "position", "first", "last", "key", "running")


@dataclass
class Seat:
    """A draft in its row. `blocks` is the draft's own list, which tells one stay from the next; `known` of them are in the table."""

    draft: Draft
    blocks: list[int]
    known: int = 0


class Rows:
    """Row r belongs to `drafts[r]`; the rows behind them are inert, as is a row whose draft has ended without the host's knowing it yet.

    `state[FIELDS, capacity]` int64: the next input token and its position; the position whose output is the first new token, and the last
    that the budget allows; the key of the random numbers; whether it runs (1 or 0). `table[capacity, width]` int32: its blocks.
    """

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self.device = device
        self.state = torch.zeros(len(FIELDS), capacity, dtype=torch.int64, device=device)
        self.table = torch.zeros(capacity, width, dtype=torch.int32, device=device)
        self.seats: list[Seat] = []

    @property
    def drafts(self) -> list[Draft]:
        return [seat.draft for seat in self.seats]

    def clear(self) -> None:
        self.seats = []
        self.state[FIELDS.index("running")].zero_()

    def fields(self, count: int) -> tuple[Tensor, ...]:
        """Views [count] of each of FIELDS."""
        return tuple(self.state[:, :count].unbind(0))

    def settle(self, live: Sequence[Draft]) -> None:
        """Seat those who run now. Who stays keeps the row and all that the device knows; rows that became free are taken by new drafts,
        then by those in the last rows, so that the live ones lie at the front."""
        before = {id(seat.blocks): row for row, seat in enumerate(self.seats)}
        seats: list[Seat | None] = [None] * len(live)
        arriving: list[tuple[Draft, int]] = []
        for draft in live:
            row = before.get(id(draft.blocks), -1)
            if 0 <= row < len(live):
                seats[row] = self.seats[row]
            else:
                arriving.append((draft, row))
        free = [row for row, seat in enumerate(seats) if seat is None]
        changes = []
        for row, (draft, source) in zip(free, arriving, strict=True):
            seats[row] = Seat(draft, draft.blocks)
            changes.append([row, source, *self._beginning(draft)])
        if changes:
            self._write(changes)
        if len(self.seats) > len(live):
            self.state[FIELDS.index("running"), len(live) : len(self.seats)].zero_()
        self.seats = [seat for seat in seats if seat is not None]
        self._update_table()

    def _beginning(self, draft: Draft) -> list[int]:
        """The fields of a draft that sits down, as the host knows them: all of its tokens are."""
        prompt = draft.request.prompt_ids
        token = draft.token_ids[-1] if draft.token_ids else prompt[-1]
        first = len(prompt) - 1
        return [token, draft.cached - 1, first, first + draft.request.max_new_tokens - 1, draft.key, 1]

    def _write(self, changes: list[list[int]]) -> None:
        """[row, source or -1, *fields] each: copied from row `source`, of which the device knows most, or else set to the fields."""
        row, source, *_ = sent = upload(changes, torch.int64, self.device).t()
        self.state[:, row] = torch.where(source >= 0, self.state[:, source.clamp(min=0)], sent[2:])

    def _update_table(self) -> None:
        entries = []
        for row, seat in enumerate(self.seats):
            if len(seat.blocks) > seat.known:
                entries += [[row, column, seat.blocks[column]] for column in range(seat.known, len(seat.blocks))]
                seat.known = len(seat.blocks)
        if entries:
            row, column, block = upload(entries, torch.int64, self.device).t()
            self.table[row, column] = block.int()
