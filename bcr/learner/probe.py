"""How large a pack fits into memory, found before the first step: with several ranks no rank can try a failed pack again alone.

A rank probes alone, without the others: a forward and backward of its whole copy of the weights, over dummy tokens, while it holds as much
memory beside it as sharded training will. So one rank out of memory leaves no other waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bcr.learner import step
from bcr.learner.losses import LossConfig
from bcr.learner.packs import Pack
from bcr.model import Decoder
from bcr.parallel.sharding import training_memory

ROW = 1024  # tokens of a dummy sequence: attention keeps nothing quadratic, so longer ones would only take longer


def fitting_pack(copy: Decoder, sharded: Decoder, loss: LossConfig, temperature: float, tokens: int, least: int, group: int = 0) -> int:
    """The largest of `tokens`, a half of it, a quarter, ..., that fits; 0 where a rollout of `least` tokens does not.

    With `group`, the most rollouts that share a prompt, it has room for their keys and values too, and may be below `least`: a rollout
    longer than the packs has one of its own, which nothing shares.
    """

    def has_room(size: int, group: int = 0) -> bool:
        return fits(copy, sharded, dummy_pack(copy, loss, size, group), loss, temperature)

    sizes = [max(tokens, least)]
    while sizes[-1] > least:
        sizes.append(max(least, sizes[-1] // 2))
    found = min(tokens, next((size for size in sizes if has_room(size)), 0))
    while group > 1 and found > 1 and not has_room(found, group):
        found //= 2
    return found


def fits(copy: Decoder, sharded: Decoder, pack: Pack, loss: LossConfig, temperature: float) -> bool:
    """Whether there is memory for learning from the pack. No weight changes and no gradient stays."""
    fitted = False
    try:
        learn_once(copy, sharded, pack, loss, temperature)
        fitted = True
    except torch.OutOfMemoryError:
        pass  # go on below, where the error no longer keeps the tensors of the failed pass alive
    if pack.input_ids.is_cuda:
        torch.cuda.empty_cache()
    return fitted


def learn_once(copy: Decoder, sharded: Decoder, pack: Pack, loss: LossConfig, temperature: float) -> None:
    held = training_memory(sharded)
    with gradients_dropped(copy):
        step.pack_loss(copy, pack, loss.rule(), temperature)[0].backward()
    del held


@contextmanager
def gradients_dropped(model: Decoder) -> Iterator[None]:
    """Backwards inside make the gradient of every trained weight and free it at once, as where it goes to the shards of all ranks."""

    def drop(weight: Tensor) -> None:
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(drop) for weight in model.parameters() if weight.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)


def dummy_pack(model: Decoder, loss: LossConfig, tokens: int, group: int = 0) -> Pack:
    """`tokens` tokens, all of them with a loss.

    With `group` every prompt has so many readers of one token each, the most that attention can be asked to hold: nearly `group` times
    the prompts' keys and values, whatever their length; those of real packs have longer completions.
    """
    device = model.head_weight.device
    row, room = min(ROW, model.config.max_position_embeddings - 1), tokens
    lengths, parents, starts = list[int](), list[int](), list[int]()  # of each sequence; its first position
    while room:
        prompt = max(1, min(row, room - group))
        readers = min(group, room - prompt)
        parents += [-1] + [len(lengths)] * readers
        lengths += [prompt] + [1] * readers
        starts += [0] + [prompt] * readers
        room -= prompt + readers
    zeros, ones = torch.zeros(tokens, device=device), torch.ones(tokens, device=device)
    ids = torch.zeros(tokens, dtype=torch.int64, device=device)
    return Pack(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(start, start + length, device=device) for start, length in zip(starts, lengths, strict=True)]),
        lengths=lengths,
        parents=parents,
        places=torch.arange(tokens, device=device),
        targets=ids,
        old_logprobs=zeros,
        segment_ids=ids,
        advantages=ones[:1],
        weights=ones / tokens,
        counts=lengths,
        behaviour_logprobs=None if loss.importance_cap is None else zeros,
        reference_logprobs=zeros if loss.kl_coef > 0 else None,
    )
