"""Problems from a file of the user's own: JSON lines with a question and an answer."""

from __future__ import annotations

import json
import random
from pathlib import Path

from bcr.records import Problem


def read_jsonl(path: str | Path, question: str = "problem", answer: str = "answer") -> list[Problem]:
    """All problems of a JSONL file. `question` and `answer` name the columns; `id`, `source` and `difficulty` are used where present.

    Raises ValueError, with one sentence, for a file that is missing or empty, a row that is no JSON object, and a row that lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data.path is {str(path)!r}: there is no such file.")
    problems: list[Problem] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: row {number} is not UTF-8 text.") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: row {number} is not valid JSON ({error}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}: row {number} is not a JSON object.")
            for column in (question, answer):
                if row.get(column) in (None, ""):
                    raise ValueError(f"{path}: row {number} lacks {column!r}.")
            difficulty = row.get("difficulty")
            problems.append(
                Problem(
                    id=str(row.get("id", f"{path.stem}/{number}")),
                    question=str(row[question]),
                    answer=str(row[answer]),
                    source=str(row.get("source", path.stem)),
                    difficulty=float(difficulty) if isinstance(difficulty, int | float) else None,
                )
            )
    if not problems:
        raise ValueError(f"{path}: the file holds no problems.")
    return problems


class ShuffledProblems:
    """A finite list as an endless source: epoch after epoch, each in an order keyed by (seed, epoch). A cursor is all its state."""

    def __init__(self, problems: list[Problem], seed: int = 0) -> None:
        self.problems, self.seed = problems, seed
        self._epoch, self._order = -1, list[int]()

    def __getitem__(self, index: int) -> Problem:
        epoch, place = divmod(index, len(self.problems))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.problems)))
            random.Random(f"{self.seed}/epoch/{epoch}").shuffle(self._order)
        return self.problems[self._order[place]]
