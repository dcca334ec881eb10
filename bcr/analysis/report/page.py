"""The page: everything above poured into page.html, with its style and its script inside."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

import jinja2
from markupsafe import Markup
from omegaconf import OmegaConf

import bcr
from bcr.analysis.report.figures import colour_of, comparison, length_by_correctness
from bcr.analysis.report.folder import Results
from bcr.analysis.report.pooling import pooling
from bcr.analysis.report.remarks import headlines, sentences
from bcr.analysis.report.training import STAGE_NAMES, training_figures
from bcr.analysis.report.transcripts import SIGNS, pairs, training_rollouts

WHAT_IS_BCR = (
    "Reasoning models spend tokens that their answers do not need.",
    "Batched Contextual Reinforcement (BCR, arXiv 2604.02322) gives a model N problems in one prompt and one token budget for all.",
    "The model answers one after the other, and the reward is nothing but the accuracy of the answers: no word about length.",
    "A problem that the budget no longer reaches earns nothing, so what is wasted on one problem is paid for by the next.",
    "So the model learns to stop wasting tokens, and keeps to that when it is asked one problem at a time.",
)


def page(results: Results) -> str:
    """The report as one HTML document. Whatever comes from models, data or files is escaped; nothing is loaded from elsewhere."""
    here = files("bcr.analysis.report")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "filters.js"))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["sign"] = lambda verdict: SIGNS.get(verdict, "·")
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    listings = [
        ("pairs", "The same problems, before and after", "N", pairs(results)),
        ("rollouts", "Rollouts of training, segment by segment", "step", training_rollouts(results.runs)),
    ]
    return template.render(
        results=results,
        version=bcr.__version__,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        what_is_bcr=WHAT_IS_BCR,
        headlines=headlines(results),
        sentences=sentences(results),
        comparison=comparison(results),
        pooling=pooling(results),
        correctness=length_by_correctness(results),
        training=training_figures(results.runs, results.main),
        stage_names=STAGE_NAMES,
        listings=[listing for listing in listings if listing[3].items],
        colour_of=colour_of,
        configs={run.title: OmegaConf.to_yaml(OmegaConf.create(run.training.config)) for run in results.runs if run.training},
    )
