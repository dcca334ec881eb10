"""Packs: several rollouts laid end to end for one forward pass, their prompts once, with everything the loss needs of each token."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
        """Places in a pack of its own: every token but the last of a sequence is an input."""
        return sum(len(prompt) + stop - start - 1 for prompt, start, stop in self.sequences)

    @property
    def has_signal(self) -> bool:
        """Whether it can change the weights at all. Without a KL term an advantage of 0 is a gradient of 0."""
        return any(self.advantages)


@dataclass(frozen=True)
class Pack:
    """R sequences end to end, T places; C completion tokens with all that the loss needs of each; S segments.

    Token c is predicted at `places[c]`, which several may share: of a prompt that stands once, the last place predicts the first token of
    every rollout. Completions 7 8 | 9 (two segments) and 7 (one) of the prompt 1 2, and 7 of the prompt 1:

        input_ids     1  2 | 7  8 | 1         places        1  2  3 | 1 | 4
        position_ids  0  1 | 2  3 | 0         targets       7  8  9 | 7 | 7
        lengths       [2, 2, 1]               segment_ids   0  0  1 | 2 | 3
        parents       [-1, 0, -1]             counts        [3, 1, 1]
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    lengths: list[int]  # [R]
    parents: list[int]  # [R] the sequence, a prompt, that it goes on from; -1: none
    places: Tensor  # [C] int64
    targets: Tensor  # [C] int64
    old_logprobs: Tensor  # [C] float32: the ratio's denominator, the sampler's or the learner's before the updates
    segment_ids: Tensor  # [C] int64, row of `advantages`
    advantages: Tensor  # [S] float32
    weights: Tensor  # [C] float32, the token's share of the loss: 1 / (global denominator)
    counts: list[int]  # completion tokens of each rollout, which stand together in C
    behaviour_logprobs: Tensor | None = None  # [C] float32, the sampler's where old_logprobs are the learner's
    reference_logprobs: Tensor | None = None  # [C] float32


def make_pack(
    examples: Sequence[Example],
    loss: LossConfig,
    total: Denominators,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    share_prompts: bool = True,
) -> Pack:
    """Lay the examples end to end, a prompt that several have only once, unless `share_prompts` is false.

    `dtype` is that of the log-probs, weights and advantages.
    """
    layout = Layout.of(examples, share_prompts)
    segment_ids, problem_ids, advantages = list[int](), list[int](), list[float]()
    problems_before = 0
    for example in examples:
        number = {problem: problems_before + k for k, problem in enumerate(sorted({segment.problem for segment in example.segments}))}
        problems_before += len(number)
        for segment, advantage in zip(example.segments, example.advantages, strict=True):
            length = segment.stop - segment.start
            segment_ids += [len(advantages)] * length
            problem_ids += [number[segment.problem]] * length
            advantages.append(advantage)

    def integers(column: list[int]) -> Tensor:
        return torch.tensor(column, dtype=torch.int64, device=device)

    def values(rows: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([value for row in rows for value in row], dtype=dtype, device=device)

    own = [example.learner_logprobs for example in examples if example.learner_logprobs is not None]
    reference = [example.reference_logprobs for example in examples if example.reference_logprobs is not None]
    sampled = [example.logprobs for example in examples]
    counts = [len(example.token_ids) for example in examples]
    rollouts = [rollout for rollout, count in enumerate(counts) for _ in range(count)]
    segments = integers(segment_ids)
    return Pack(
        input_ids=integers(layout.inputs),
        position_ids=integers(layout.positions),
        lengths=layout.lengths,
        parents=layout.parents,
        places=integers(layout.places),
        targets=integers([token for example in examples for token in example.token_ids]),
        old_logprobs=values(own or sampled),
        segment_ids=segments,
        advantages=torch.tensor(advantages, dtype=dtype, device=device),
        weights=token_weights(loss, total, segments, integers(rollouts), integers(problem_ids), dtype),
        counts=counts,
        behaviour_logprobs=values(sampled) if own else None,
        reference_logprobs=values(reference) if reference else None,
    )


@dataclass
class Layout:
    """Where the tokens of a pack lie; the fields are those of `Pack`."""

    inputs: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @staticmethod
    def of(examples: Sequence[Example], share_prompts: bool) -> Layout:
        layout = Layout()
        readers = Counter(tuple(prompt) for example in examples for prompt, _, _ in example.sequences)
        laid = dict[tuple[int, ...], tuple[int, int]]()  # prompts that lie there: their sequence and their last place
        for example in examples:
            for prompt, start, stop in example.sequences:
                assert stop > start, "a context without a completion has nothing to learn"
                tokens, key = example.token_ids[start : stop - 1], tuple(prompt)
                if not share_prompts or readers[key] == 1:
                    last = len(layout.inputs) + len(prompt) - 1
                    layout.lay([*prompt, *tokens], 0, -1)
                    layout.places += range(last, last + stop - start)
                    continue
                if key not in laid:
                    laid[key] = len(layout.lengths), len(layout.inputs) + len(prompt) - 1
                    layout.lay(prompt, 0, -1)
                parent, last = laid[key]
                layout.places += [last, *range(len(layout.inputs), len(layout.inputs) + len(tokens))]
                if tokens:
                    layout.lay(tokens, len(prompt), parent)
        return layout

    def lay(self, tokens: Sequence[int], position: int, parent: int) -> None:
        self.inputs += tokens
        self.positions += range(position, position + len(tokens))
        self.lengths.append(len(tokens))
        self.parents.append(parent)


def silent_pack(loss: LossConfig, device: torch.device | str = "cpu") -> Pack:
    """A pack of one token without a loss. Its gradient is 0, but it goes through every layer: for a rank where others have more packs."""
    token, nothing = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
    return Pack(
        input_ids=token,
        position_ids=token,
        lengths=[1],
        parents=[-1],
        places=token,
        targets=token + IGNORED,
        old_logprobs=nothing,
        segment_ids=token - 1,
        advantages=nothing,
        weights=nothing,
        counts=[1],
        behaviour_logprobs=None if loss.importance_cap is None else nothing,
        reference_logprobs=nothing if loss.kl_coef > 0 else None,
    )


def by_prompt(examples: Iterable[Example], share_prompts: bool = True) -> list[tuple[int, list[int]]]:
    """(its tokens, the tokens of each completion) of every prompt that stands in a pack of these examples."""
    prompts = dict[Sequence[int] | int, tuple[int, list[int]]]()
    for example in examples:
        for prompt, start, stop in example.sequences:
            key = tuple(prompt) if share_prompts else len(prompts)
            prompts.setdefault(key, (len(prompt), []))[1].append(stop - start)
    return list(prompts.values())


def places(examples: Iterable[Example], share_prompts: bool = True) -> int:
    """Of a pack of these examples: every token but the last of a completion is an input."""
    return sum(prompt + sum(completions) - len(completions) for prompt, completions in by_prompt(examples, share_prompts))


def pack_examples(examples: Iterable[Example], pack_tokens: int, share_prompts: bool = True) -> list[list[Example]]:
    """Examples grouped into packs of at most `pack_tokens` places, so that like lengths meet and little is padded.

    With `share_prompts` the rollouts of one prompt stay together where they fit; where they do not, the prompt stands in several packs. An
    example longer than `pack_tokens` makes a pack of its own.
    """
    falling = sorted(examples, key=lambda example: -example.length)
    if not share_prompts:
        return fill(falling, pack_tokens, share_prompts)
    groups = dict[tuple[int, ...], list[Example]]()
    for example in falling:
        groups.setdefault(tuple(example.sequences[0][0]), []).append(example)
    bundles = [(places(part), part) for group in groups.values() for part in fill(group, pack_tokens, share_prompts)]
    packs, rooms = list[list[Example]](), list[int]()
    for size, part in sorted(bundles, key=lambda bundle: -bundle[0]):  # first fit decreasing
        number = next((number for number, room in enumerate(rooms) if size <= room), len(packs))
        if number == len(packs):
            packs.append([])
            rooms.append(pack_tokens)
        packs[number] += part
        rooms[number] -= size
    return packs


def fill(examples: Iterable[Example], pack_tokens: int, share_prompts: bool) -> list[list[Example]]:
    """One pack after the other, in order: a new one where an example does not fit any more."""
    packs: list[list[Example]] = []
    laid, room = set[tuple[int, ...]](), 0
    for example in examples:
        prompts = {tuple(prompt) for prompt, _, _ in example.sequences} if share_prompts else set()
        if example.length - sum(map(len, prompts & laid)) > room:
            packs.append([])
            laid, room = set(), pack_tokens
        room -= example.length - sum(map(len, prompts & laid))
        laid |= prompts
        packs[-1].append(example)
    return packs
