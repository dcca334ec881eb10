"""Log-probs of completions under a model, without gradient: of the policy before its updates, of a frozen reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from bcr.learner.forward import hidden_states
from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.packs import IGNORED, Example, make_pack
from bcr.model import Decoder
from bcr_kernels import linear_logprob


@torch.no_grad()
def completion_logprobs(
    model: Decoder, groups: Sequence[Sequence[Example]], temperature: float, device: torch.device
) -> list[list[list[float]]]:
    """For each group of examples (a pack), each example and each completion token its log-prob: full vocabulary, at `temperature`."""
    found = []
    for group in groups:
        pack = make_pack(group, LossConfig(), Denominators.of(example.segments for example in group), device)
        hidden = hidden_states(model, pack)
        logprobs = linear_logprob(hidden, model.head_weight, pack.targets, temperature=temperature).logprob
        values = logprobs[pack.targets != IGNORED].tolist()
        ends = itertools.accumulate((len(example.token_ids) for example in group), initial=0)
        found.append([values[start:stop] for start, stop in itertools.pairwise(ends)])
    return found
