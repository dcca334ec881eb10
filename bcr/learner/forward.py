"""The model and its head over a pack."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from bcr.learner.packs import Pack
from bcr.model import Decoder
from bcr.model.attention import PackedAttention
from bcr.model.decoder import Head
from bcr.model.readers import Readers, read
from bcr.model.row_attention import ALIGN, InvariantAttention


def through_head(model: Decoder, pack: Pack, head: Head) -> Any:
    """head(hidden[C,H] of the places that predict the pack's completion tokens, head_weight[V,H]); with `model.invariant` the hidden states
    are those that the sampler computed, to the last bit, on a CPU.

    For that attention is taken row by row as in the sampler, and the tokens are filled up to a multiple of ALIGN, as there.
    """
    device, token_ids, positions = pack.input_ids.device, pack.input_ids, pack.position_ids
    kind: type[PackedAttention] | type[InvariantAttention] = PackedAttention
    if model.invariant and device.type == "cpu":  # on CUDA it would not be the sampler's arithmetic
        kind = InvariantAttention
        token_ids, positions = (F.pad(x, (0, -len(x) % ALIGN)) for x in (token_ids, positions))
    readers = Readers(pack.places, len(token_ids))
    attention = kind(pack.lengths, device, pack.parents)
    return model(token_ids, positions, attention, lambda hidden, weight: head(read(hidden, pack.places, readers), weight))
