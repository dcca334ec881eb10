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
    `contexts`, where the completion was sampled in several: the prompt of each and how many of the completion's tokens are its own. Such a
    rollout is one sequence for each context to the model, and one rollout to the loss.
    """

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    segments: Sequence[Segment]
    advantages: Sequence[float]
    learner_logprobs: Sequence[float] | None = None
    reference_logprobs: Sequence[float] | None = None
    contexts: Sequence[tuple[Sequence[int], int]] | None = None

    @property
    def sequences(self) -> list[tuple[Sequence[int], int, int]]:
        """(prompt, start, stop) of each context: completion tokens start <= t < stop follow that prompt."""
        contexts = [(self.prompt_ids, len(self.token_ids))] if self.contexts is None else self.contexts
        stops = itertools.accumulate(length for _, length in contexts)
        return [(prompt, stop - length, stop) for (prompt, length), stop in zip(contexts, stops, strict=True)]

    @property
    def length(self) -> int:
        """Places in a pack: every token but the last of a sequence is an input."""
        return sum(len(prompt) + stop - start - 1 for prompt, start, stop in self.sequences)

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
    inputs, positions, targets, segment_ids, sequence_ids, problem_ids, lengths = (list[int]() for _ in range(7))
    advantages = list[float]()
    problems_before = 0
    for rollout, example in enumerate(examples):
        number = {problem: problems_before + k for k, problem in enumerate(sorted({segment.problem for segment in example.segments}))}
        problems_before += len(number)
        segment_of, problem_of = list[int](), list[int]()  # completion tokens
        for segment, advantage in zip(example.segments, example.advantages, strict=True):
            length = segment.stop - segment.start
            segment_of += [len(advantages)] * length
            problem_of += [number[segment.problem]] * length
            advantages.append(advantage)
        for prompt, start, stop in example.sequences:
            silent = len(prompt) - 1
            lengths.append(silent + stop - start)
            inputs += [*prompt, *example.token_ids[start : stop - 1]]
            positions += range(lengths[-1])
            targets += [IGNORED] * silent + [*example.token_ids[start:stop]]
            segment_ids += [-1] * silent + segment_of[start:stop]
            problem_ids += [-1] * silent + problem_of[start:stop]
            sequence_ids += [rollout] * lengths[-1]

    def integers(column: list[int]) -> Tensor:
        return torch.tensor(column, dtype=torch.int64, device=device)

    def aligned(rows: Sequence[Sequence[float]]) -> Tensor:
        """Values of completion tokens [T], 0 in prompts."""
        column = [
            value
            for example, row in zip(examples, rows, strict=True)
            for prompt, start, stop in example.sequences
            for value in ([0.0] * (len(prompt) - 1) + [*row[start:stop]])
        ]
        return torch.tensor(column, dtype=dtype, device=device)

    own = [example.learner_logprobs for example in examples if example.learner_logprobs is not None]
    reference = [example.reference_logprobs for example in examples if example.reference_logprobs is not None]
    sampled = [example.logprobs for example in examples]
    segments = integers(segment_ids)
    return Pack(
        input_ids=integers(inputs),
        position_ids=integers(positions),
        lengths=lengths,
        targets=integers(targets),
        old_logprobs=aligned(own or sampled),
        segment_ids=segments,
        advantages=torch.tensor(advantages, dtype=dtype, device=device),
        weights=token_weights(loss, total, segments, integers(sequence_ids), integers(problem_ids), dtype),
        behaviour_logprobs=aligned(sampled) if own else None,
        reference_logprobs=aligned(reference) if reference else None,
    )


def silent_pack(loss: LossConfig, device: torch.device | str = "cpu") -> Pack:
    """A pack of one token without a loss. Its gradient is 0, but it goes through every layer: for a rank where others have more packs."""
    token, nothing = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
    return Pack(
        input_ids=token,
        position_ids=token,
        lengths=[1],
        targets=token + IGNORED,
        old_logprobs=nothing,
        segment_ids=token - 1,
        advantages=nothing,
        weights=nothing,
        behaviour_logprobs=None if loss.importance_cap is None else nothing,
        reference_logprobs=nothing if loss.kl_coef > 0 else None,
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
