"""The page of a study: what study.json says, in figures, sentences and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import bcr
from bcr.analysis import study_tables as tables
from bcr.analysis.report import study_panels as panels
from bcr.analysis.report.figures import Figure
from bcr.analysis.report.folder import parsed

Summary = Mapping[str, Any]

HOW_TO_READ = (
    "Every cell is a training run, repeated with several seeds and measured on the same held-out problems, alone and with N problems in "
    "one prompt. Intervals are 95 % bootstrap intervals over problems, paired where two cells are compared; they do not speak of other "
    "seeds, so a difference counts as shown only where its interval leaves out 0 and every seed has its sign."
)
AS_IT_IS = "as configs/train.yaml has it"


def read_study(folder: Path) -> Summary:
    """ValueError where study.json is not what `bcr.study` writes."""
    summary = parsed((folder / "study.json").read_text(encoding="utf-8"), "study.json")
    if lacking := [key for key in ("study", "title", "measurement", "cells", "compare", "said") if key not in summary]:
        raise ValueError(f"{folder / 'study.json'} has no {lacking[0]!r}; it must be the study.json of a study.")
    return summary


def study_page(summary: Summary) -> str:
    """One HTML document; nothing is loaded from elsewhere, everything from files is escaped."""
    here = files("bcr.analysis.report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["plain"] = lambda cell: cell.replace("**", "")
    template = environment.from_string(here.joinpath("study.html").read_text(encoding="utf-8"))
    return template.render(
        summary=summary,
        version=bcr.__version__,
        style=Markup(here.joinpath("style.css").read_text(encoding="utf-8")),
        how_to_read=HOW_TO_READ,
        done=tables.done(summary),
        figures=[figure for figure in all_figures(summary) if figure.panels],
        colour_of=panels.colour_of,
        overrides={cell["title"]: " ".join(map(json.dumps, cell["overrides"])) or AS_IT_IS for cell in trained(summary)},
    )


def trained(summary: Summary) -> list[Summary]:
    return [cell for name, cell in summary["cells"].items() if name != "base"]


def all_figures(summary: Summary) -> list[Figure]:
    sizes = [str(size) for size in summary["measurement"]["sizes"]]
    ends = list(dict.fromkeys([sizes[0], sizes[-1]]))
    others = [name for name in summary["cells"] if name != "base"]
    main = others[:1]
    trios = [["base", *dict.fromkeys([*main, name])] for name in others]
    label = {name: cell["label"] for name, cell in summary["cells"].items()}
    compared = [
        *((f"Accuracy, N = {size}", panels.differences(summary, "accuracy", size)) for size in ends),
        (f"Tokens, N = {sizes[0]}", panels.differences(summary, "tokens", sizes[0])),
    ]
    return [
        Figure(
            "at-one",
            "Accuracy against tokens",
            f"Every cell with N = {sizes[0]}: up and to the left is better. Tokens on a logarithmic axis.",
            [(f"N = {sizes[0]}", panels.accuracy_against_tokens(summary))],
            tables.at_one(summary),
        ),
        Figure(
            "differences",
            "What is beyond each control",
            "The difference of two cells on the same problems. Filled points are shown, hollow ones not; upright marks are the seeds.",
            compared if summary["compare"] else [],
            tables.differences(summary, "accuracy"),
        ),
        Figure(
            "by-n",
            "Accuracy and length by N",
            "Each cell beside the base and the first cell of the study, with room for all N problems.",
            [
                (f"{label[trio[-1]]}: {quantity}", panels.by_size(summary, trio, quantity))
                for trio in trios
                for quantity in ("accuracy", "tokens")
            ],
            tables.by_size(summary),
        ),
        Figure(
            "budgets",
            "Accuracy under token budgets",
            f"The same completions at N = {sizes[0]}, cut to each budget and judged again.",
            [(label[trio[-1]], panels.under_budgets(summary, trio)) for trio in trios],
            tables.under_budgets(summary),
        ),
        Figure(
            "training",
            "What training took",
            "All tokens sampled in training, mean over seeds.",
            [("Tokens sampled", panels.training_tokens(summary))] if trained(summary) else [],
        ),
    ]
