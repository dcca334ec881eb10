"""The dialect of text models: a form (the paper's Markdown, or REST's), a chat template where there is one, and thinking text."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from bcr.records import Problem
from bcr.tasks.chat import ChatTemplate
from bcr.tasks.dialect import Finish, Mark, Reading, partition, spell
from bcr.tasks.markdown import ask_markdown, read_markdown
from bcr.tasks.rest import ask_rest, read_rest
from bcr.tasks.thinking import CLOSE, OPEN, end_of_thinking, mentions, separates

FORMS = {"markdown": (ask_markdown, read_markdown), "rest": (ask_rest, read_rest)}
CHECKS = re.compile(r"\b(wait|let me (?:re-?)?check|double[- ]check|let me verify)\b", re.IGNORECASE)


class TextDialect:
    """Asks in one of the FORMS and reads answers from what follows the thinking part, by the rules of `bcr.tasks.dialect`.

    Thinking counts for credit, not for answers (unless `answers_in_thinking`): its passages are told apart by `bcr.tasks.thinking`. A
    passage counts as answered when the completion answers its problem in the end. Where thinking does not separate, the whole
    completion is one segment of problem 0, which is answerable for all that follows: the credit of `scope: rollout`.
    """

    max_problems = 64

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_token_ids: Sequence[int],
        form: str = "markdown",
        chat: ChatTemplate | None = None,
        answers_in_thinking: bool = False,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"dialect.form is {form!r}; it must be one of {', '.join(FORMS)}.")
        self.tokenizer = tokenizer
        self.stop_token_ids = tuple(stop_token_ids)
        self.ask, self.read_form = FORMS[form]
        self.chat = chat
        self.answers_in_thinking = answers_in_thinking
        self.opens_thinking = chat is not None and chat.render("1 + 1 = ?").rstrip().endswith(OPEN)

    def prompt_ids(self, problems: Sequence[Problem]) -> list[int]:
        text = self.ask(problems)
        if self.chat is not None:
            return self.tokenizer.encode(self.chat.render(text), add_special_tokens=False).ids
        return self.tokenizer.encode(f"{text}\n\n## Solutions\n\n", add_special_tokens=True).ids

    def read(self, token_ids: Sequence[int], finish: Finish, num_problems: int) -> Reading:
        text, starts = spell(self.tokenizer, token_ids[:-1] if finish == "stop" else token_ids)
        marks, answers = self.read_text(text, finish, num_problems)
        # The token that holds a marker's first character opens the segment; of two markers in one token the later one does.
        tokens = {bisect.bisect_right(starts, mark.start) - 1: mark for mark in marks}
        in_order = [Mark(token, mark.problem, mark.answered) for token, mark in sorted(tokens.items())]
        return Reading(answers, partition(in_order, len(token_ids)))

    def read_text(self, text: str, finish: Finish, num_problems: int) -> tuple[list[Mark], tuple[str | None, ...]]:
        """Marks (by character) and answers."""
        body = 0 if self.answers_in_thinking else end_of_thinking(text, self.opens_thinking)
        said, answers = self.read_form(text[body:], finish, num_problems)
        after = [Mark(body + mark.start, mark.problem, mark.answered) for mark in said]
        thought = text[:body].replace(OPEN, " " * len(OPEN)).replace(CLOSE, " " * len(CLOSE))  # tags take room and say nothing
        if not thought.strip():
            return after, answers
        passages = mentions(thought, num_problems)
        if not separates(passages, num_problems):
            return [Mark(0, 0, answered=all(answer is not None for answer in answers))], answers
        return [Mark(mark.start, mark.problem, answers[mark.problem] is not None) for mark in passages] + after, answers

    def count_checks(self, token_ids: Sequence[int]) -> int:
        return len(CHECKS.findall(spell(self.tokenizer, token_ids)[0]))
