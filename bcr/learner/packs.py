"""Packs: several rollouts laid end to end for one forward pass, with everything the loss needs of each token."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bcr.learner.losses import Denominators, LossConfig, token_weights
from bcr.records import Segment

IGNORED = -100  # target of a token that predicts nothing we train on


@dataclass(frozen=True)
class Example:
    """One rollout as the learner sees it; `advantages` has one number for each segment.

    `logprobs` are the sampler's. Where the learner has computed its own before the updates, or those of a reference, they are here too.
    """

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    segments: Sequence[Segment]
    advantages: Sequence[float]
    learner_logprobs: Sequence[float] | None = None
    reference_logprobs: Sequence[float] | None = None

    @property
    def length(self) -> int:
        """Places in a pack: every token but the last is an input."""
        return len(self.prompt_ids) + len(self.token_ids) - 1

    @property
    def has_signal(self) -> bool:
        """Whether it can change the weights at all. Without a KL term an advantage of 0 is a gradient of 0."""
        return any(self.advantages)


@dataclass(frozen=True)
class Pack:
    """R rollouts end to end, T tokens, S segments. Place t predicts `targets[t]`, the token after it; everything else is aligned with that.

    Two rollouts, prompts (1 2) and (1), completions (7 8 | 9) with two segments and (7) with one:

        input_ids     1  2  7  8 | 1          targets       -100  7  8  9 | 7
        position_ids  0  1  2  3 | 0          segment_ids     -1  0  0  1 | 2
        lengths       [4, 1]
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    lengths: list[int]  # [R]
    targets: Tensor  # [T] int64, IGNORED in prompts
    old_logprobs: Tensor  # [T] float32, of the targets: the ratio's denominator, the sampler's or the learner's before the updates
    segment_ids: Tensor  # [T] int64, row of `advantages`; -1 in prompts
    advantages: Tensor  # [S] float32
    weights: Tensor  # [T] float32, the token's share of the loss: 1 / (global denominator)
    behaviour_logprobs: Tensor | None = None  # [T] float32, the sampler's where old_logprobs are the learner's
    reference_logprobs: Tensor | None = None  # [T] float32

    @property
    def cu_seqlens(self) -> Tensor:
        """Boundaries [R+1] of the sequences, int32."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=self.input_ids.device)


def make_pack(
    examples: Sequence[Example],
    loss: LossConfig,
    total: Denominators,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Pack:
    """Lay the examples end to end; `dtype` is that of the log-probs, weights and advantages."""
    inputs, positions, targets, segment_ids, sequence_ids, problem_ids = (list[int]() for _ in range(6))
    old_logprobs, advantages = list[float](), list[float]()
    problems_before = 0
    for sequence, example in enumerate(examples):
        silent = len(example.prompt_ids) - 1
        inputs += [*example.prompt_ids, *example.token_ids[:-1]]
        positions += range(example.length)
        targets += [IGNORED] * silent + [*example.token_ids]
        old_logprobs += [0.0] * silent + [*(example.logprobs if example.learner_logprobs is None else example.learner_logprobs)]
        sequence_ids += [sequence] * example.length
        segment_ids += [-1] * silent
        problem_ids += [-1] * silent
        number = {problem: problems_before + k for k, problem in enumerate(sorted({segment.problem for segment in example.segments}))}
        problems_before += len(number)
        for segment, advantage in zip(example.segments, example.advantages, strict=True):
            length = segment.stop - segment.start
            segment_ids += [len(advantages)] * length
            problem_ids += [number[segment.problem]] * length
            advantages.append(advantage)

    def integers(column: list[int]) -> Tensor:
        return torch.tensor(column, dtype=torch.int64, device=device)

    def aligned(rows: list[Sequence[float] | None]) -> Tensor | None:
        """Values of completion tokens [T], 0 in prompts; None where the examples have none."""
        columns = [[0.0] * (len(example.prompt_ids) - 1) + [*row] for example, row in zip(examples, rows, strict=True) if row is not None]
        return torch.tensor(list(itertools.chain.from_iterable(columns)), dtype=dtype, device=device) if columns else None

    segments = integers(segment_ids)
    return Pack(
        input_ids=integers(inputs),
        position_ids=integers(positions),
        lengths=[example.length for example in examples],
        targets=integers(targets),
        old_logprobs=torch.tensor(old_logprobs, dtype=dtype, device=device),
        segment_ids=segments,
        advantages=torch.tensor(advantages, dtype=dtype, device=device),
        weights=token_weights(loss, total, segments, integers(sequence_ids), integers(problem_ids), dtype),
        behaviour_logprobs=aligned([None if example.learner_logprobs is None else example.logprobs for example in examples]),
        reference_logprobs=aligned([example.reference_logprobs for example in examples]),
    )


def pack_examples(examples: Iterable[Example], pack_tokens: int) -> list[list[Example]]:
    """Examples grouped into packs of at most `pack_tokens` tokens, longest first, so that like lengths meet and little is padded.

    An example longer than `pack_tokens` makes a pack of its own.
    """
    packs: list[list[Example]] = []
    room = 0
    for example in sorted(examples, key=lambda example: -example.length):
        if example.length > room:
            packs.append([])
            room = pack_tokens
        packs[-1].append(example)
        room -= example.length
    return packs
