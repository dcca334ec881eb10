"""`python -m bcr.results DOCUMENT [--studies outputs/study]`: the tables, sentences and figures of a document of results, from its JSON.

With `--studies` the study.json of every experiment below that folder is copied beside the document first, without what is not needed:
DOCUMENT.md has its data in the folder DOCUMENT/. What stands between `<!-- EXPERIMENT BLOCK ... -->` and `<!-- end -->` is written anew;
the rest is left alone. `EXPERIMENT BLOCK` is looked up in `BLOCKS`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bcr.analysis import study_tables as tables
from bcr.analysis.study_answers import answers
from bcr.analysis.study_claims import claims
from bcr.analysis.study_figures import FIGURES
from bcr.runtime.config import BAD_INPUT, fail, one_sentence
from bcr.runtime.outputs import write_whole

Summary = Mapping[str, Any]

TABLES: dict[str, Callable[..., tables.Numbers]] = {
    "at_one": tables.at_one,
    "by_size": tables.by_size,
    "under_shared": lambda summary, budget: tables.under_shared(summary, int(budget)),
    "under_budgets": tables.under_budgets,
    "differences": tables.differences,
    "lengths": tables.lengths,
    "breakdown": lambda summary, *names: tables.breakdown(summary, names or None),
    "by_position": lambda summary, size, *names: tables.by_position(summary, int(size), names or None),
    "collapse": tables.collapse,
    "claims": claims,
}
BLOCKS: dict[str, Callable[..., str]] = {
    **{name: partial(lambda table, *asked: tables.markdown(table(*asked)), table) for name, table in TABLES.items()},
    "answer": lambda summary, question: "\n".join(f"- {sentence}" for sentence in answers(summary, question)),
    "done": tables.done,
}
BLOCK = re.compile(r"<!-- (\w+) (\w+)((?: \w+)*) -->\n.*?<!-- end -->", re.DOTALL)


def render(text: str, summaries: Mapping[str, Summary]) -> str:
    """The document with every block written anew. ValueError for a block that nothing knows."""

    def block(match: re.Match[str]) -> str:
        experiment, name, arguments = match[1], match[2], match[3].split()
        if experiment not in summaries or name not in BLOCKS:
            raise ValueError(f"<!-- {experiment} {name} -->: there are {', '.join(summaries)}, each with {', '.join(BLOCKS)}.")
        head = " ".join([experiment, name, *arguments])
        return f"<!-- {head} -->\n{BLOCKS[name](summaries[experiment], *arguments)}\n<!-- end -->"

    return BLOCK.sub(block, text)


def read_summaries(folder: Path) -> dict[str, Summary]:
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def collect(studies: Path, folder: Path) -> None:
    """Copy every study.json, on one line a cell or comparison."""
    found = sorted(studies.glob("*/study.json"))
    if not found:
        raise ValueError(f"{studies} holds no study: no EXPERIMENT/study.json is there.")
    folder.mkdir(parents=True, exist_ok=True)
    for file in found:
        summary = json.loads(file.read_text(encoding="utf-8"))
        write_whole(folder / f"{summary['study']}.json", compact(summary))


def compact(summary: Summary) -> str:
    """JSON with one line for each entry of the top level, and for each cell and comparison."""

    def line(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)

    def entry(value: Any) -> str:
        if isinstance(value, dict):
            return "{\n" + ",\n".join(f"  {line(key)}: {line(inner)}" for key, inner in value.items()) + "\n }"
        if isinstance(value, list):
            return "[\n" + ",\n".join(f"  {line(inner)}" for inner in value) + "\n ]"
        return line(value)

    return "{\n" + ",\n".join(f" {line(key)}: {entry(value)}" for key, value in summary.items()) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bcr.results", description="Write the tables and figures of a document of results anew."
    )
    parser.add_argument("document", metavar="DOCUMENT", type=Path, help="such as docs/results.md; its data is in the folder docs/results/")
    parser.add_argument("--studies", metavar="FOLDER", type=Path, help="the output of bcr.study; its results replace the document's data")
    asked = parser.parse_args(arguments)
    folder = asked.document.with_suffix("")
    try:
        if asked.studies is not None:
            collect(asked.studies, folder)
        summaries = read_summaries(folder)
        write_whole(asked.document, render(asked.document.read_text(encoding="utf-8"), summaries))
        for name, (experiment, draw) in FIGURES.items():
            if experiment in summaries:
                write_whole(folder / f"{name}.svg", draw(summaries[experiment]))
    except (ValueError, OSError) as error:
        fail("results", one_sentence(error), BAD_INPUT)
    print(f"{asked.document} and {folder}/")


if __name__ == "__main__":
    main()
