"""Watching a run: what looks wrong is said at once, with advice; a run that cannot learn any more is stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bcr.analysis.warning_signs import ADVICE, COLLAPSE, EXPLOSION, NAMES, entropy_explosion, is_number, length_collapse

REMIND_EVERY = 10  # steps that a condition lasts until it is said again


@dataclass
class GuardConfig:
    """When to warn and when to give up; see `Guards`."""

    max_skipped: int = 3
    mismatch_kl: float = 0.01
    collapse: float = 0.5
    window: int = 10

    def check(self) -> None:
        for name in ("max_skipped", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"guards.{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.mismatch_kl > 0:
            raise ValueError(f"guards.mismatch_kl is {self.mismatch_kl}; it must be positive.")
        if not 0 <= self.collapse < 1:
            raise ValueError(f"guards.collapse is {self.collapse}; it must be from 0 (never) up to, but not including, 1.")


@dataclass(frozen=True)
class Warning:
    kind: str
    message: str


class Guards:
    """Looks at the metrics of every step. Its state is part of a checkpoint: a resumed run warns and stops where an undisturbed one would.

    skipped      the update was skipped, for its loss or gradient was not finite; after `max_skipped` in a row `verdict` says why to stop
    mismatch     `mismatch_kl` (sampler against learner, nats per token) is above its bound
    truncated    every rollout ran into the budget
    unreadable   no answer could be read in any rollout
    collapse     the mean accuracy of the last `window` steps is below `collapse` times that of the best `window` steps so far
    length_collapse, entropy_explosion     see `bcr.analysis.warning_signs`
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped_in_row = 0
        self.lasting: dict[str, int] = {}  # kind -> steps in a row
        self.recent: list[float] = []  # accuracies of the last `window` steps
        self.best = 0.0
        self.history: dict[str, list[float]] = {"tokens_per_problem": [], "accuracy": [], "entropy": []}  # of every step, finite ones

    def look(self, metrics: Mapping[str, Any]) -> list[Warning]:
        """What is to be said about this step: a condition when it begins, and again for every ten steps that it lasts."""
        self.recent = [*self.recent, float(metrics["accuracy"])][-self.config.window :]
        if len(self.recent) == self.config.window:
            self.best = max(self.best, self.accuracy)
        self.skipped_in_row = self.skipped_in_row + 1 if metrics["skipped"] else 0
        for name, series in self.history.items():
            if is_number(metrics[name]):
                series.append(float(metrics[name]))
        present = {kind: advice for kind, (holds, advice) in CONDITIONS.items() if holds(self, metrics)}
        self.lasting = {kind: self.lasting.get(kind, 0) + 1 for kind in present}
        return [Warning(kind, advice(self, metrics)) for kind, advice in present.items() if self.lasting[kind] % REMIND_EVERY == 1]

    @property
    def accuracy(self) -> float:
        return sum(self.recent) / len(self.recent)

    @property
    def verdict(self) -> str | None:
        """Why the run should end, or None."""
        if self.skipped_in_row < self.config.max_skipped:
            return None
        return (
            f"{self.skipped_in_row} updates in a row had a loss or gradient that is not finite (guards.max_skipped); events.jsonl names "
            "the rollouts. Lower optimizer.lr, or go back to an earlier checkpoint."
        )

    def state_dict(self) -> dict[str, Any]:
        plain = {"skipped_in_row": self.skipped_in_row, "lasting": self.lasting, "recent": self.recent, "best": self.best}
        return {**plain, "history": {name: list(series) for name, series in self.history.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped_in_row, self.best = state["skipped_in_row"], state["best"]
        self.lasting, self.recent = dict(state["lasting"]), list(state["recent"])
        self.history = {name: list(series) for name, series in state["history"].items()}


Holds = Callable[[Guards, Mapping[str, Any]], bool]
Advice = Callable[[Guards, Mapping[str, Any]], str]

CONDITIONS: dict[str, tuple[Holds, Advice]] = {
    "skipped": (
        lambda guards, metrics: bool(metrics["skipped"]),
        lambda guards, metrics: "The loss or the gradient is not finite: the weights stay as they were. A lower optimizer.lr may help.",
    ),
    "mismatch": (
        lambda guards, metrics: metrics["mismatch_kl"] > guards.config.mismatch_kl,
        lambda guards, metrics: (
            f"Sampler and learner disagree: KL {metrics['mismatch_kl']:.2g} nats a token, the bound is {guards.config.mismatch_kl:.2g} "
            "(guards.mismatch_kl). Set loss.importance_cap=2, or compute both in the same precision."
        ),
    ),
    "truncated": (
        lambda guards, metrics: metrics["truncated"] == 1.0,
        lambda guards, metrics: "Every rollout ran into the budget: raise bundles.budget, or check that the model writes its stop token.",
    ),
    "unreadable": (
        lambda guards, metrics: metrics["unanswered"] + metrics["unparsed"] == 1.0,
        lambda guards, metrics: (
            "No rollout has an answer that can be read, so nothing is rewarded: read rollouts.jsonl. A model must write the asked form "
            "now and then; warm it up first, change dialect.form, or raise bundles.budget."
        ),
    ),
    "collapse": (
        lambda guards, metrics: len(guards.recent) == guards.config.window and guards.accuracy < guards.config.collapse * guards.best,
        lambda guards, metrics: (
            f"The reward has collapsed: accuracy {guards.accuracy:.1%} over the last {guards.config.window} steps, {guards.best:.1%} at "
            "its best. Go back to an earlier checkpoint with a lower optimizer.lr, or add loss.kl_coef."
        ),
    ),
    COLLAPSE: (
        lambda guards, metrics: length_collapse(guards.history["tokens_per_problem"], guards.history["accuracy"]),
        lambda guards, metrics: f"{NAMES[COLLAPSE]}. {ADVICE[COLLAPSE]}",
    ),
    EXPLOSION: (
        lambda guards, metrics: entropy_explosion(guards.history["entropy"]),
        lambda guards, metrics: f"{NAMES[EXPLOSION]}. {ADVICE[EXPLOSION]}",
    ),
}
