"""Log-probs of completions under a model, without gradient: of the policy before its updates, of a frozen reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch

from bcr.learner.forward import through_head
from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.packs import Example, make_pack, silent_pack
from bcr.model import Decoder
from bcr.parallel.sharding import release
from bcr_kernels import linear_logprob


@torch.no_grad()
def completion_logprobs(
    model: Decoder,
    groups: Sequence[Sequence[Example]],
    temperature: float,
    device: torch.device,
    share_prompts: bool = True,
) -> list[list[list[float]]]:
    """For each group of examples (a pack), each example and each completion token its log-prob: full vocabulary, at `temperature`.

    Of sharded weights every rank calls it, with the same number of groups; some may be empty.
    """
    found = []
    for group in groups:
        total = Denominators.of(example.segments for example in group)
        pack = make_pack(group, LossConfig(), total, device, share_prompts=share_prompts) if group else silent_pack(LossConfig(), device)
        head = partial(linear_logprob, targets=pack.targets, temperature=temperature)
        values = through_head(model, pack, head).logprob.tolist()
        ends = itertools.accumulate((len(example.token_ids) for example in group), initial=0)
        found.append([values[start:stop] for start, stop in itertools.pairwise(ends)])
    release(model)
    return found
