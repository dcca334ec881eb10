"""Figures of a study that stand alone, as SVG files beside a document: the panels of its page, with the page's colours inside."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from bcr.analysis.report.study_panels import accuracy_against_tokens, by_size, differences

Summary = Mapping[str, Any]


FRAME = 14  # pixels around it: nothing is drawn beyond the edge of an image
SVG = '<svg xmlns="http://www.w3.org/2000/svg" '


def standalone(svg: Markup) -> str:
    """An SVG of the page as a file of its own: with the page's colours, light and dark, its rules for figures, and a frame."""
    sheet = files("bcr.analysis.report").joinpath("style.css").read_text(encoding="utf-8")
    colours, _, _ = sheet.partition("* {")
    rules = [line for line in sheet.splitlines() if line.startswith("svg ")]
    style = "\n".join([colours, *rules, "svg { background: var(--paper); font-family: system-ui, sans-serif; }"])
    opening, _, inside = str(svg).partition(">")
    opening = re.sub(r'viewBox="0 0 (\d+) (\d+)"', framed, opening.replace("<svg ", SVG, 1))
    return f"{opening}><style>{style}</style>{inside}\n"


def framed(box: re.Match[str]) -> str:
    width, height = (int(size) + 2 * FRAME for size in box.groups())
    return f'viewBox="{-FRAME} {-FRAME} {width} {height}"'


def of_cells(summary: Summary, names: tuple[str, ...], quantity: str) -> str:
    """Some cells over N, those that are there."""
    return standalone(by_size(summary, [name for name in names if name in summary["cells"]], quantity))


FIGURES: dict[str, tuple[str, Callable[[Summary], str]]] = {  # file -> experiment, drawing
    "accuracy-tokens": ("rivals", lambda summary: standalone(accuracy_against_tokens(summary))),
    "differences": ("rivals", lambda summary: standalone(differences(summary, "accuracy", "1"))),
    "differences-packed": ("rivals", lambda summary: standalone(differences(summary, "accuracy", "3"))),
    "accuracy-by-n": ("recipes", lambda summary: of_cells(summary, ("base", "bcr", "mixed", "mixed_long"), "accuracy")),
    "tokens-by-n": ("recipes", lambda summary: of_cells(summary, ("base", "bcr", "mixed", "mixed_long"), "tokens")),
}
