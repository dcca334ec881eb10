"""The model over a pack."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bcr.learner.packs import Pack
from bcr.model import Decoder
from bcr.model.attention import PackedAttention
from bcr.model.row_attention import ALIGN, InvariantAttention


def hidden_states(model: Decoder, pack: Pack) -> Tensor:
    """Hidden states [T,H] of the pack's tokens; with `model.invariant` those that the sampler computed, to the last bit, on a CPU.

    For that attention is taken row by row as in the sampler, and the tokens are filled up to a multiple of ALIGN, as there.
    """
    if not model.invariant or pack.input_ids.is_cuda:  # on CUDA it would not be the sampler's arithmetic
        return model(pack.input_ids, pack.position_ids, PackedAttention(pack.lengths, pack.input_ids.device))
    count = pack.input_ids.shape[0]
    token_ids, positions = (F.pad(x, (0, -count % ALIGN)) for x in (pack.input_ids, pack.position_ids))
    return model(token_ids, positions, InvariantAttention(pack.lengths, pack.input_ids.device))[:count]
