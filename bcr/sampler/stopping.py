"""When a completion is over: a stop token, a stop string, or its budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from bcr.sampler.sampling import SamplingParams
from bcr.sampler.scheduler import Draft

BYTES_IN_CHARACTER = 4  # a byte-level token may hold one byte of a character


class Stopping:
    """stopping(draft) -> "stop", "length" or None, after each token. Raises ValueError for stop strings without a way to read tokens."""

    def __init__(self, params: SamplingParams, decode: Callable[[list[int]], str] | None) -> None:
        if params.stop_strings and decode is None:
            raise ValueError("sampling.stop_strings need decode=, which turns tokens into text.")
        self.stop_token_ids, self.stop_strings, self.decode = frozenset(params.stop_token_ids), params.stop_strings, decode
        self.window = BYTES_IN_CHARACTER * (1 + max(map(len, params.stop_strings), default=0))

    def __call__(self, draft: Draft) -> Literal["stop", "length"] | None:
        if draft.token_ids[-1] in self.stop_token_ids or (self.stop_strings and self._spelled(draft.token_ids)):
            return "stop"
        return "length" if len(draft.token_ids) >= draft.request.max_new_tokens else None

    def _spelled(self, token_ids: list[int]) -> bool:
        """Whether the last tokens spell a stop string. Those before the window were looked at when they came."""
        assert self.decode is not None
        text = self.decode(token_ids[-self.window :])
        return any(string in text for string in self.stop_strings)
