"""The model and its head over a pack."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from bcr.learner.packs import Pack
from bcr.model import Decoder
from bcr.model.attention import PackedAttention
from bcr.model.decoder import Head
from bcr.model.row_attention import ALIGN, InvariantAttention


def through_head(model: Decoder, pack: Pack, head: Head) -> Any:
    """head(hidden[T,H] of the pack's tokens, head_weight[V,H]); with `model.invariant` the hidden states are those that the sampler
    computed, to the last bit, on a CPU.

    For that attention is taken row by row as in the sampler, and the tokens are filled up to a multiple of ALIGN, as there.
    """
    if not model.invariant or pack.input_ids.is_cuda:  # on CUDA it would not be the sampler's arithmetic
        return model(pack.input_ids, pack.position_ids, PackedAttention(pack.lengths, pack.input_ids.device), head)
    count = pack.input_ids.shape[0]
    token_ids, positions = (F.pad(x, (0, -count % ALIGN)) for x in (pack.input_ids, pack.position_ids))
    attention = InvariantAttention(pack.lengths, pack.input_ids.device)
    return model(token_ids, positions, attention, lambda hidden, weight: head(hidden[:count], weight))
