"""Does this machine keep the rules of `invariant` mode? Asked once for each sampler, on the model's own weights, in milliseconds.

The rules are facts about matrix products on CPUs, not promises of torch: `bcr/model/row_attention.py` states them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from bcr.model import Decoder
from bcr.model.row_attention import SPAN, TILE, attend_chunk, readable


def check_invariance(model: Decoder, row_block: int) -> str | None:
    """A sentence where a row's numbers depend on the number of rows, on its place among them, or on how its attention is cut; else None."""
    count, config, weight = 5 * row_block + 128, model.config, model.embed_tokens.weight
    token_ids = torch.ones(count - count % row_block, dtype=torch.int64, device=weight.device) % config.vocab_size
    many, few = (logits_of_equal_rows(model, rows) for rows in (token_ids, token_ids[:row_block]))
    rows_agree = bool((many == many[0]).all()) and bool((few == many[0]).all())

    generator = torch.Generator().manual_seed(0)
    heads, size, context = config.num_attention_heads, config.head_dim, SPAN + TILE
    query, key, value = (
        torch.randn(context, kind, size, generator=generator).to(weight.dtype)
        for kind in (heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    keys, values = (F.pad(x.transpose(0, 1), (0, 0, 0, readable(context) - context)) for x in (key, value))
    whole = attend_chunk(query, keys, values, 0)
    places = (0, 5, 70, SPAN - 1, SPAN, context - 1)
    cuts_agree = all(torch.equal(attend_chunk(query[p : p + 1], keys, values, p)[0], whole[p]) for p in places)
    if rows_agree and cuts_agree:
        return None
    where = "matrix products of different numbers of rows" if not rows_agree else "attention cut in different ways"
    return (
        f"with {torch.get_num_threads()} threads this machine gives a row other last bits in {where}, so rollouts depend on their company; "
        f"raise sampling.row_block (now {row_block}) or take fewer threads; sampling.invariant=false accepts it."
    )


@torch.inference_mode()
def logits_of_equal_rows(model: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [T,V] of T equal tokens at position 1, with the query in place of attention."""
    hidden = model(token_ids, torch.ones_like(token_ids), lambda layer, query, key, value: query)
    return model.logits(hidden)


@torch.inference_mode()
def check_places(model: Decoder, counts: Sequence[int]) -> str | None:
    """For the paged path, whose passes always have one of `counts` rows: a sentence where equal rows of a pass get other last bits."""
    for count in counts:
        ones = torch.ones(count, dtype=torch.int64, device=model.embed_tokens.weight.device) % model.config.vocab_size
        hidden = model(ones, torch.ones_like(ones), lambda layer, query, key, value: query)
        if not bool((hidden == hidden[0]).all()):
            return f"this device gives equal rows of a pass of {count} other last bits; sampling.invariant=false accepts it."
    return None
