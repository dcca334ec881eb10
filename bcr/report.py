"""`python -m bcr.report FOLDER`: one HTML file, report.html, on a training run, a demo or a study. It opens offline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bcr.analysis.report.folder import read_results
from bcr.analysis.report.page import page
from bcr.analysis.report.study import read_study, study_page
from bcr.runtime.config import BAD_INPUT, fail, one_sentence

NAME = "report.html"


def write_report(folder: Path) -> Path:
    """Read what `folder` holds so far, write `folder`/report.html whole or not at all, and return its path.

    ValueError where the folder holds no study, no demo and no training run; OSError where it cannot be read or written.
    """
    file, unfinished = folder / NAME, folder / f".{NAME}.tmp"
    text = study_page(read_study(folder)) if (folder / "study.json").exists() else page(read_results(folder))
    unfinished.write_bytes(text.encode("utf-8", errors="replace"))
    unfinished.replace(file)
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bcr.report",
        description="Make one HTML file (FOLDER/report.html) that tells what a run showed: figures, training curves, transcripts.",
        epilog="The file opens offline, on a phone too. A run may still be going on: the report is of what it has written so far.",
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="the output folder of a training run, of the demo or of a study, e.g. outputs/train"
    )
    folder = parser.parse_args(arguments).folder
    try:
        print(write_report(folder))
    except (ValueError, OSError) as error:
        fail("report", one_sentence(error), BAD_INPUT)


if __name__ == "__main__":
    main()
