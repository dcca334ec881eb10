"""What the figures come to in a few numbers and sentences: what shows, and what does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bcr.analysis.report.figures import Z
from bcr.analysis.report.folder import Results, Training
from bcr.analysis.report.training import ends

PARITY = 1e-3  # |delta log-prob| above it is more than rounding in float32
ONE_SEED = "One seed: the intervals cover the choice of problems and the sampling of answers, not what another training run would give."


@dataclass(frozen=True)
class Headline:
    """A number for the top of the page. `value` is what changed, `says` from where to where."""

    name: str
    value: str
    says: str


def headlines(results: Results) -> list[Headline]:
    main, base = results.main, results.base
    if base is not None and base is not main and base.measures and main.measures:
        return compared(results)
    if main.training is None or not main.training.metrics:
        return []
    steps = main.training.metrics
    tokens, accuracy, cut = (ends(steps, name) for name in ("tokens_per_problem", "accuracy", "truncated"))
    return [
        Headline("tokens per problem", change(tokens[1] / tokens[0] - 1), f"{tokens[0]:.1f} at first, {tokens[1]:.1f} at last"),
        Headline("accuracy in training", points(accuracy[1] - accuracy[0]), f"{accuracy[0]:.1%} at first, {accuracy[1]:.1%} at last"),
        Headline("rollouts cut off", points(cut[1] - cut[0]), f"{cut[0]:.0%} at first, {cut[1]:.0%} at last"),
    ]


def compared(results: Results) -> list[Headline]:
    """The main run against the base, at the smallest N and under the one shared budget."""
    main, base = results.main, results.base
    assert base is not None
    size = min(set(main.measures) & set(base.measures), default=None)
    found = []
    if size is not None:
        now, before = main.measures[size], base.measures[size]
        ratio = now["tokens_per_problem"] / before["tokens_per_problem"] - 1
        error = Z * math.hypot(now["accuracy_se"], before["accuracy_se"])
        found = [
            Headline(
                f"tokens per problem, N = {size}",
                change(ratio),
                f"{before['tokens_per_problem']:.1f} before, {now['tokens_per_problem']:.1f} after",
            ),
            Headline(
                f"accuracy, N = {size}",
                points(now["accuracy"] - before["accuracy"]),
                f"{before['accuracy']:.1%} before, {now['accuracy']:.1%} after; ± {100 * error:.1f} points on the change (95 %)",
            ),
        ]
    shared = results.summary.get("shared_budget")
    if shared and main.key in shared and shared.get("base"):
        gains = [
            (after - before, n, before, after) for n, before, after in zip(shared["sizes"], shared["base"], shared[main.key], strict=False)
        ]
        gain, n, low, high = max(gains)
        found.append(
            Headline(
                f"accuracy, {shared['tokens']} tokens for N = {n}",
                points(gain),
                f"{low:.1%} before, {high:.1%} after; the N that gains most",
            )
        )
    return found


def change(ratio: float) -> str:
    return f"{'−' if ratio < 0 else '+'}{abs(ratio):.0%}"


def points(difference: float) -> str:
    return f"{'−' if difference < 0 else '+'}{abs(100 * difference):.1f} points"


def sentences(results: Results) -> list[str]:
    """The demo's own conclusions, or what can be said of a training run alone; and the limits of both."""
    said = [str(sentence) for sentence in results.summary.get("said", [])]
    if not results.summary and results.main.training is not None:
        said += said_of_training(results.main.training)
    return said if any(sentence.startswith("One seed") for sentence in said) else [*said, ONE_SEED]


def said_of_training(training: Training) -> list[str]:
    steps = training.metrics
    if not steps:
        return ["No step is finished yet."]
    said = []
    tokens, accuracy = ends(steps, "tokens_per_problem"), ends(steps, "accuracy")
    if tokens[1] >= tokens[0]:
        said.append(f"Not shown: shorter answers. Tokens per problem go from {tokens[0]:.1f} to {tokens[1]:.1f}.")
    if accuracy[1] <= accuracy[0]:
        said.append(f"Not shown: a gain in accuracy. It goes from {accuracy[0]:.1%} to {accuracy[1]:.1%}.")
    silent = steps[-1].get("unanswered", 0.0) + steps[-1].get("unparsed", 0.0)
    if silent > 0.05:
        said.append(f"At the last step {silent:.0%} of the problems have no answer that can be read.")
    apart = max(step.get("dlogprob_max", 0.0) for step in steps)
    if apart > PARITY:
        said.append(f"The sampler's log-probs differ from the learner's by up to {apart:.1e}: more than rounding, look there first.")
    said.append(
        "This is accuracy on the problems of training, sampled by a policy that changes at every step. What the policy does on other "
        "problems, and at other N, is what bcr.evaluate measures."
    )
    return said
