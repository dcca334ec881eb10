"""The training curves of one run: tokens, accuracy and what goes with them, with the two stages marked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup

from bcr.analysis.measures import wilson
from bcr.analysis.report.curves import percent, plain
from bcr.analysis.report.figures import Z, colour_of
from bcr.analysis.report.folder import Record, Run
from bcr.analysis.report.stages import FEWEST_STEPS, Stages, find_stages
from bcr.analysis.report.svg import Panel, nice_limits, ticks_between
from bcr.analysis.warning_signs import ADVICE, COLLAPSE, EXPLOSION, NAMES, Sign, signs

STAGE_NAMES = ("length adaptation", "reasoning refinement")


@dataclass(frozen=True)
class Curve:
    """What one panel shows: a metric of every step, its interval where it has one, and its scale."""

    heading: str
    value: Callable[[Record], float | None]
    interval: Callable[[Record], tuple[float, float]] | None
    shown: Callable[[float], str]
    whole_scale: tuple[float, float] | None = None


def tokens_band(step: Record) -> tuple[float, float]:
    half = Z * step.get("tokens_per_problem_se", 0.0)
    return step["tokens_per_problem"] - half, step["tokens_per_problem"] + half


TOKENS = Curve("Tokens per problem", lambda step: step["tokens_per_problem"], tokens_band, plain)
ACCURACY = Curve("Accuracy", lambda step: step["accuracy"], lambda step: wilson(step["accuracy"], step["problems"]), percent, (0.0, 1.0))
TRUNCATED = Curve("Rollouts cut off by the budget", lambda step: step.get("truncated"), None, percent, (0.0, 1.0))
ENTROPY = Curve("Entropy, nats per token", lambda step: step.get("entropy"), None, plain)
CORRECT = Curve("Tokens, correct answers", lambda step: step.get("tokens_correct"), None, plain)
OTHER = Curve("Tokens, other answers", lambda step: step.get("tokens_wrong"), None, plain)
MAIN, BRIEF = (TOKENS, ACCURACY, TRUNCATED, ENTROPY, CORRECT, OTHER), (TOKENS, ACCURACY, TRUNCATED)
WATCHED = {COLLAPSE: (TOKENS, ACCURACY), EXPLOSION: (ENTROPY,)}  # where a sign is marked
SAME_SCALE = {TOKENS.heading: "tokens", CORRECT.heading: "tokens", OTHER.heading: "tokens", ENTROPY.heading: "entropy"}


@dataclass(frozen=True)
class TrainingFigure:
    """`says`: one sentence on the stages. `advice`: (what went wrong, what helps). `panels`: (heading, svg)."""

    run: Run
    says: str
    advice: list[tuple[str, str]]
    panels: list[tuple[str, Markup]]


def training_figures(runs: Sequence[Run], main: Run) -> list[TrainingFigure]:
    """One for each run that has taken a step; a quantity has one scale in all of them."""
    trained = [run for run in runs if run.training is not None and run.training.metrics]
    limits: dict[str, tuple[float, float]] = {}
    for name in set(SAME_SCALE.values()):
        curves = [curve for curve in MAIN if SAME_SCALE.get(curve.heading) == name]
        limits[name] = nice_limits([value for run in trained for curve in curves for _, value in points_of(curve, run)])
    figures = []
    for run in sorted(trained, key=lambda run: run.key != main.key):
        assert run.training is not None
        steps = run.training.metrics
        stages = find_stages([step["tokens_per_problem"] for step in steps])
        found = signs(steps)
        panels = []
        for curve in MAIN if run.key == main.key else (*BRIEF, *(ENTROPY for sign in found if sign.kind == EXPLOSION)):
            scale = curve.whole_scale or limits[SAME_SCALE[curve.heading]]
            if points_of(curve, run):
                panels.append((curve.heading, curve_panel(run, curve, scale, stages, found)))
        figures.append(TrainingFigure(run, describe(steps, stages), advice(steps, stages if run.key == main.key else None, found), panels))
    return figures


def points_of(curve: Curve, run: Run) -> list[tuple[float, float]]:
    assert run.training is not None
    found = [(float(step["step"]), curve.value(step)) for step in run.training.metrics]
    return [(at, float(value)) for at, value in found if value is not None and math.isfinite(value)]


def curve_panel(run: Run, curve: Curve, scale: tuple[float, float], stages: Stages, found: Sequence[Sign]) -> Markup:
    assert run.training is not None
    steps = run.training.metrics
    first, last = float(steps[0]["step"]), float(steps[-1]["step"])
    panel = Panel((first, max(last, first + 1)), scale)
    if stages.change is not None:
        change = float(steps[stages.change]["step"])
        panel.stretch(first, change, STAGE_NAMES[0], "stage first", curve is ACCURACY)
        panel.stretch(change, last, STAGE_NAMES[1], "stage second", curve is ACCURACY)
    panel.axes(ticks_between(first, max(last, first + 1), whole=True), ticks_between(*scale), "step", curve.shown)
    colour = colour_of(run)
    if curve.interval is not None:
        bounds = [(float(step["step"]), *curve.interval(step)) for step in steps if math.isfinite(curve.value(step) or 0.0)]
        low = [(at, max(scale[0], below)) for at, below, _ in bounds]
        panel.band(low, [(at, min(scale[1], above)) for at, _, above in bounds], colour)
    points = points_of(curve, run)
    panel.line(points, colour)
    if len(points) == 1:
        panel.dot(*points[0], colour, f"step {points[0][0]:g}")
    if curve is TOKENS and stages.fit:
        panel.line([(float(step["step"]), value) for step, value in zip(steps, stages.fit, strict=True)], "ink", kind="fit")
    if stages.change is not None:
        panel.upright(float(steps[stages.change]["step"]))
    marked = [sign for sign in found if curve in WATCHED[sign.kind]]
    for sign in marked:
        panel.upright(float(steps[sign.first]["step"]), "alarm")
    show = percent if curve.shown is percent else "{:.3g}".format
    said = f"{curve.heading} of {run.title}: {show(points[0][1])} at step {first:g}, {show(points[-1][1])} at step {last:g}."
    return panel.svg(" ".join([said, *(f"{NAMES[sign.kind]} at step {steps[sign.first]['step']}." for sign in marked)]))


def describe(steps: Sequence[Record], stages: Stages) -> str:
    """What the curves say about the two stages, whichever way it is."""
    start, end = ends(steps, "tokens_per_problem")
    if len(steps) < FEWEST_STEPS:
        return f"{len(steps)} {'step' if len(steps) == 1 else 'steps'}: too few to look for stages (it takes {FEWEST_STEPS})."
    if stages.kind == "no fall":
        return f"No length adaptation: tokens per problem go from {start:.1f} to {end:.1f} (means of the first and last steps)."
    if stages.change is None:
        return f"Still in length adaptation at the last step: tokens per problem have come from {start:.1f} to {end:.1f} without a plateau."
    before = steps[: stages.change]
    begun = ends(before, "accuracy")[0]
    reached, finished, error = refinement(steps[stages.change :])
    rise = finished - reached
    verdict = "rises further" if rise > 2 * error else "falls" if rise < -2 * error else "does not change measurably"
    return (
        f"Length adaptation until step {before[-1]['step']}: tokens per problem fall from {stages.fit[0]:.0f} to "
        f"{stages.fit[stages.change]:.0f} while accuracy goes from {begun:.0%} to {reached:.0%}. Reasoning refinement after it: the length "
        f"stays, and accuracy {verdict} ({reached:.0%} to {finished:.0%}, standard error {100 * error:.1f} points)."
    )


def refinement(after: Sequence[Record]) -> tuple[float, float, float]:
    """Accuracy at the beginning and at the end of the second stage, and the standard error of their difference."""
    error = math.hypot(standard_error(after[: window(after)]), standard_error(after[-window(after) :]))
    return *ends(after, "accuracy"), error


NO_ADAPTATION = (
    "Nothing makes answers shorter. Lower bundles.budget towards the length that is wanted, so that long answers lose something: sampling "
    "at the target length is what arXiv 2602.20945 found best."
)
NO_REFINEMENT = (
    "The length has settled, and accuracy has risen neither before nor after. If it stays so: more signal (a larger bundles.group, easier "
    "problems, see bcr.difficulty), learning on-policy, a roomier bundles.budget; or the model answers what it can within this budget."
)
LONG_ENOUGH = 10  # steps of a plateau before one can speak of a missing second stage


def advice(steps: Sequence[Record], stages: Stages | None, found: Sequence[Sign]) -> list[tuple[str, str]]:
    """Where the run leaves the path of the two stages: what is wrong, and what helps against it. Without `stages`, as for a control that is
    not meant to have them, a stage that is missing is no fault."""
    given = []
    for sign in found:
        over = "" if sign.lasts else "; it has passed"
        given.append((f"{NAMES[sign.kind]} at step {steps[sign.first]['step']}{over}.", ADVICE[sign.kind]))
    if given or stages is None or len(steps) < FEWEST_STEPS:
        return given
    if stages.kind == "no fall":
        return [("No first stage.", NO_ADAPTATION)]
    if stages.change is not None and len(steps) - stages.change >= LONG_ENOUGH:
        reached, finished, error = refinement(steps[stages.change :])
        begun = ends(steps, "accuracy")[0]
        if finished - min(begun, reached) <= 2 * error:  # what was gained while the length fell counts too
            return [("No second stage.", NO_REFINEMENT)]
    return given


def window(steps: Sequence[Record]) -> int:
    """How many steps at either end are averaged: a fifth, at least one, at most ten."""
    return max(1, min(10, len(steps) // 5))


def ends(steps: Sequence[Record], name: str) -> tuple[float, float]:
    """Means over the first steps, few because much changes there, and over the last ones."""
    return fmean(step[name] for step in steps[: opening(steps)]), fmean(step[name] for step in steps[-window(steps) :])


def opening(steps: Sequence[Record]) -> int:
    """How many first steps are averaged: a twentieth, at least one, at most three."""
    return max(1, min(3, len(steps) // 20))


def standard_error(steps: Sequence[Record]) -> float:
    """Of the mean accuracy over steps, from each step's own (problems taken as independent)."""
    return math.sqrt(math.fsum(step.get("accuracy_se", 0.0) ** 2 for step in steps)) / len(steps)
