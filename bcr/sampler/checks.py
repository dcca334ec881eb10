"""What a request must be: one sentence, naming it, before any work."""

from __future__ import annotations

from collections.abc import Sequence

from bcr.model import DecoderConfig
from bcr.records import Request


def check_requests(requests: Sequence[Request], config: DecoderConfig) -> None:
    """Raise ValueError for an empty prompt, a budget below 1, an unknown token, a sequence beyond the context, a repeated id."""
    seen = set()
    for request in requests:
        if not request.prompt_ids:
            raise ValueError(f"request {request.id!r} has an empty prompt.")
        if request.max_new_tokens < 1:
            raise ValueError(f"request {request.id!r} has max_new_tokens = {request.max_new_tokens}; it must be at least 1.")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < config.vocab_size:
            raise ValueError(f"request {request.id!r} has a token outside the vocabulary of {config.vocab_size}.")
        needed = len(request.prompt_ids) + request.max_new_tokens
        if needed > config.max_position_embeddings:
            raise ValueError(
                f"request {request.id!r} needs {needed} positions ({len(request.prompt_ids)} for its prompt, "
                f"{request.max_new_tokens} new); the model's context is {config.max_position_embeddings}."
            )
        if request.id in seen:
            raise ValueError(f"request {request.id!r} appears twice; ids key the random numbers and must differ.")
        seen.add(request.id)
