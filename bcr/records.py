"""The records that travel from problems to packs. Plain data: no torch, no model, no behaviour worth the name.

problems -> Bundle -> Request -> Rollout -> Segment and Verdict -> (advantages, packs: `bcr.learner`)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its gold answer. `difficulty` is whatever its source gives; None where it gives none."""

    id: str
    question: str
    answer: str
    source: str
    difficulty: float | None = None


@dataclass(frozen=True, slots=True)
class Bundle:
    """N problems in one prompt; `budget` is the number of new tokens that the N answers share.

    `prompts`, where given, has a prompt for each problem: each is asked in a context of its own, in turn, and `prompt_ids` is not used.
    """

    id: str
    problems: tuple[Problem, ...]
    prompt_ids: list[int]
    budget: int
    prompts: list[list[int]] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What the sampler is asked: a prompt and a cap on new tokens. `id` keys the random numbers: see `bcr.sampler`."""

    id: str
    prompt_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion (the prompt is not repeated).

    `logprobs` are float32 log-probs of `token_ids` under the full vocabulary at the sampling temperature.
    `finish` is "stop" when the last token is a stop token (it is included), "length" when the cap ended it.
    `contexts`, where given: the completion is that of N contexts end to end, with so many tokens of each problem in its own; 0 for one
    that found no budget left.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]
    policy_version: int
    contexts: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """Completion tokens start <= t < stop belong to `problem` (its index in the bundle, from 0).

    `answered` is whether the segment leaves its problem with an answer that counts; see `bcr.learner.advantages` for what that decides.
    """

    problem: int
    start: int
    stop: int
    answered: bool = True


class Verdict(StrEnum):
    """What became of one problem in one rollout. Only CORRECT is rewarded; the others are counted apart."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNANSWERED = "unanswered"  # no answer was marked for this problem
    UNPARSED = "unparsed"  # an answer was marked but cannot be read
    TIMEOUT = "timeout"  # judging took longer than the deadline
    ERROR = "error"  # the worker died while judging
