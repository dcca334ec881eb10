"""Problems from files and from the hub: JSON lines, JSON, CSV, Parquet, or a hub data set, by the `datasets` library."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcr.records import Problem
from bcr.tasks.markdown import closing_brace

FORMATS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
ANSWER_FORMS = ("plain", "boxed", "hashes")


@dataclass(frozen=True)
class Columns:
    r"""Which columns hold what. `id` and `difficulty` are used where a row has them, `source` always bears that name.

    `answer_form`: "plain" is the answer itself; "boxed" a solution with the answer in its last \boxed{}; "hashes" a solution that ends
    with `#### answer` (GSM8K). A list of answers is joined with ", ".
    """

    question: str = "problem"
    answer: str = "answer"
    id: str = "id"
    difficulty: str = "difficulty"
    answer_form: str = "plain"

    def __post_init__(self) -> None:
        if self.answer_form not in ANSWER_FORMS:
            raise ValueError(f"data.answer_form is {self.answer_form!r}; it must be one of {', '.join(ANSWER_FORMS)}.")


def read_file(path: str | Path, columns: Columns | None = None, *, unanswered: bool = False) -> list[Problem]:
    """All problems of a file: .jsonl, .json, .csv or .parquet (anything else is taken for JSON lines). With `unanswered` a row
    may lack its answer, which is "" then.

    Raises ValueError, with one sentence, for a file that is missing, empty or damaged, and for a row that lacks a column, whose
    difficulty is no number, or whose solution holds no answer.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data.path is {str(path)!r}: there is no such file.")
    format = FORMATS.get(path.suffix)
    rows = json_lines(path) if format is None else dataset_rows(str(path), format, data_files=[str(path)], split="train")
    return to_problems(rows, str(path), path.stem, columns or Columns(), unanswered=unanswered)


def read_hub(repo: str, subset: str | None, split: str, columns: Columns | None = None) -> list[Problem]:
    """All problems of one split of a hub data set. ValueError, with one sentence, where the hub cannot be reached or has no such thing."""
    rows = dataset_rows(repo, repo, name=subset, split=split)
    return to_problems(rows, repo, repo.split("/")[-1], columns or Columns())


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: row {number} is not UTF-8 text.") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: row {number} is not valid JSON ({error}).") from error


def dataset_rows(where: str, source: str, **options: Any) -> Iterator[tuple[int, Any]]:
    """(row number, row) as `datasets` streams them, so that nothing is copied into its cache."""
    import datasets  # imported here: it takes a second, and JSON lines do without it

    datasets.disable_progress_bars()
    try:
        yield from enumerate(datasets.load_dataset(source, streaming=True, **options), start=1)
    except Exception as error:  # the library's errors have no common class
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        if source in FORMATS.values():
            raise ValueError(f"{where}: cannot be read as {source} ({reason}).") from error
        advice = "copy the data to a file and name it with data.path"
        raise ValueError(f"data.hub is {where!r}: the hub did not give it ({reason}); {advice}.") from error


def to_problems(rows: Iterable[tuple[int, Any]], where: str, name: str, columns: Columns, *, unanswered: bool = False) -> list[Problem]:
    """One problem a row; `where` stands in errors, `name` in ids and sources that the rows do not give."""
    problems = []
    for number, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: row {number} is not a JSON object.")
        silent = unanswered and row.get(columns.answer) in (None, "", [])
        for column in (columns.question,) if silent else (columns.question, columns.answer):
            if row.get(column) in (None, "", []):
                raise ValueError(f"{where}: row {number} lacks {column!r}.")
        if not isinstance(row[columns.question], str):
            raise ValueError(f"{where}: row {number} has a {columns.question!r} that is no text.")
        answer = "" if silent else answer_of(row[columns.answer], columns.answer_form)
        if answer is None or not (answer or silent):
            raise ValueError(f"{where}: row {number} holds no answer in {columns.answer!r} (data.answer_form={columns.answer_form}).")
        given = {key: row[key] for key in (columns.id, "source") if row.get(key) is not None}
        problems.append(
            Problem(
                id=str(given.get(columns.id, f"{name}/{number}")),
                question=row[columns.question],
                answer=answer,
                source=str(given.get("source", name)),
                difficulty=difficulty_of(row.get(columns.difficulty), f"{where}: row {number}", columns.difficulty),
            )
        )
    if not problems:
        raise ValueError(f"{where}: the file holds no problems.")
    return problems


def answer_of(value: Any, form: str) -> str | None:
    """The gold answer in a cell; None where it holds none.

    >>> [answer_of(value, "plain") for value in (36, ["1", "2"])]
    ['36', '1, 2']
    >>> answer_of("It is \\\\boxed{1}, no, \\\\boxed{\\\\frac{1}{2}}.", "boxed"), answer_of("2 + 2 = 4\\n#### 4", "hashes")
    ('\\\\frac{1}{2}', '4')
    """
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if form == "plain":
        return text
    mark = {"boxed": "\\boxed{", "hashes": "####"}[form]
    at = text.rfind(mark)
    if at < 0:
        return None
    if form == "hashes":
        return text[at + len(mark) :].strip()
    closing = closing_brace(text, at + len(mark))
    return None if closing is None else text[at + len(mark) : closing].strip()


def difficulty_of(value: Any, where: str, column: str) -> float | None:
    """A finite number, or None where the row gives none; ValueError for anything else."""
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} has the {column} {value!r}; it must be a number, or left out.")
    return number


class ShuffledProblems:
    """A finite list as an endless source: epoch after epoch, each in an order keyed by (seed, epoch). A cursor is all its state."""

    def __init__(self, problems: Sequence[Problem], seed: int = 0) -> None:
        self.problems, self.seed = problems, seed
        self._epoch, self._order = -1, list[int]()

    def __getitem__(self, index: int) -> Problem:
        epoch, place = divmod(index, len(self.problems))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.problems)))
            random.Random(f"{self.seed}/epoch/{epoch}").shuffle(self._order)
        return self.problems[self._order[place]]
