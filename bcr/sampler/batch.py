"""The state of the decoding rows, as tensors on the device that move on from step to step without the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bcr.sampler.scheduler import Draft


class Batch:
    """Row r belongs to `drafts[r]`. token[R]: its next input; position[R]: where that stands; generated[R]: how many tokens it has written;
    key[R]: of its random numbers; table[R,W] int32: its blocks, filled up with 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.drafts: list[Draft] = []
        self.blocks: list[list[int]] = []
        self.cuts: list[slice] | None = None  # which rows attention reads together; it finds that out
        self.token = self.position = self.generated = self.key = torch.zeros(0, dtype=torch.int64, device=device)
        self.table = torch.zeros(0, 1, dtype=torch.int32, device=device)

    def settle(self, live: list[Draft]) -> None:
        """Take in who runs now. A row that stays keeps its token on the device: the host may not have seen it yet."""
        if live != self.drafts:
            self._replace(live)
            self.cuts = None
        if [draft.blocks for draft in live] != self.blocks:
            self.blocks, self.cuts = [list(draft.blocks) for draft in live], None
            width = max(map(len, self.blocks), default=1)
            self.table = upload([row + [0] * (width - len(row)) for row in self.blocks], torch.int32, self.device).view(len(live), width)

    def advance(self, tokens: Tensor) -> None:
        """After a step: the sampled token is the next input."""
        self.token = tokens
        self.position = self.position + 1
        self.generated = self.generated + 1

    def _replace(self, live: list[Draft]) -> None:
        before = {id(draft): row for row, draft in enumerate(self.drafts)}
        rows = [before.get(id(draft), -1) for draft in live]
        fresh = self._ids([[*draft.request.prompt_ids[-1:], *draft.token_ids[-1:]][-1] for draft in live])
        if self.drafts:
            source = self._ids(rows)
            fresh = torch.where(source >= 0, self.token[source], fresh)
        self.token = fresh
        self.position = self._ids([draft.cached - 1 for draft in live])
        self.generated = self.position - self._ids([len(draft.request.prompt_ids) - 1 for draft in live])
        self.key = self._ids([draft.key for draft in live])
        self.drafts = live

    def _ids(self, values: Sequence[int]) -> Tensor:
        return upload(values, torch.int64, self.device)


def upload(values: Sequence[object] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host values on the device, without waiting for it: the copy is from pinned memory, which torch keeps until it is done."""
    held = torch.as_tensor(values, dtype=dtype)
    return held if device.type == "cpu" else held.pin_memory().to(device, non_blocking=True)
