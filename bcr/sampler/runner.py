"""One step of the model: a token for each decoding row and the chunks of prompts beside them, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bcr.model import Decoder
from bcr.model.decoder import Attention
from bcr.model.row_attention import round_up
from bcr.sampler.batch import Batch
from bcr.sampler.scheduler import Chunk


def forward(model: Decoder, batch: Batch, chunks: Sequence[Chunk], attention: Attention, row_block: int) -> Tensor:
    """Logits [R,V] of the batch's R rows. The tokens of the pass are filled up to a multiple of `row_block`: see `invariance.py`."""
    rows, device = len(batch.drafts), batch.device
    token_ids, positions = [batch.token], [batch.position]
    for chunk in chunks:
        token_ids.append(torch.tensor(chunk.token_ids, device=device))
        positions.append(torch.arange(chunk.start, chunk.start + len(chunk.token_ids), device=device))
    count = rows + sum(len(chunk.token_ids) for chunk in chunks)
    token_ids.append(torch.zeros(-count % row_block, dtype=torch.int64, device=device))
    positions.append(token_ids[-1])
    hidden = model(torch.cat(token_ids), torch.cat(positions), attention)
    return model.logits(hidden[: round_up(rows, row_block)])[:rows]
