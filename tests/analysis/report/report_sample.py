"""A made-up demo folder, complete and deterministic, as the layout in bcr/analysis/report/folder.py wants it."""

import json
import math
import random
from pathlib import Path

SIZES = [1, 2, 3, 6]
RUNS = {  # accuracy and tokens per problem at N = 1, and what each further problem takes from the accuracy
    "base": ("The shipped base", 0.85, 52.0, 0.005),
    "bcr": ("BCR, N = 3, 120 tokens shared", 0.91, 24.0, 0.01),
    "grpo": ("GRPO on single problems", 0.96, 83.0, 0.03),
    "bcr_tight": ("BCR, N = 3, 66 tokens shared", 0.91, 19.5, 0.02),
    "same_cap": ("Single problems, 22 tokens each", 0.65, 18.0, 0.01),
    "penalty": ("Single problems, penalty on length", 0.09, 5.0, 0.001),
}
POOLED = [("bcr_tight", 0.99, 0.02), ("same_cap", 1.2, 0.27)]  # accuracy without operations, and what each takes away


def measures(accuracy: float, tokens: float) -> dict:
    error = math.sqrt(accuracy * (1 - accuracy) / 600)
    return {
        "accuracy": accuracy,
        "accuracy_se": error,
        "tokens_per_problem": tokens,
        "tokens_per_problem_se": tokens / 40,
        "tokens_correct": tokens * 0.95,
        "tokens_wrong": tokens * 1.4 if accuracy < 0.95 else None,
        "checks_per_problem": 1.0,
        "problems": 600,
        "truncated": 0.1,
        "wrong": 1 - accuracy,
        "unanswered": 0.0,
        "unparsed": 0.0,
        "timeout": 0.0,
        "error": 0.0,
        "entropy": 0.08,
    }


def transcript(random: random.Random, size: int, bundle: int, tokens: float, accuracy: float, credited: bool) -> dict:
    problems, segments = [], []
    for number in range(size):
        verdict = "correct" if random.random() < accuracy else random.choice(["wrong", "unanswered"])
        a, b = (bundle * 7 + number * 5) % 13, (bundle * 3 + number) % 13
        answer = str((a + b) % 13)
        problems.append({"id": f"p/{bundle}/{number}", "question": f"{a} + {b}", "answer": answer, "verdict": verdict})
        if verdict != "unanswered":
            count = max(4, round(random.gauss(tokens, tokens / 6)))
            text = f"Q{number + 1} {a} + {b} = {answer} wait check " * (count // 12 + 1) + f"so {answer} ."
            segments.append({"problem": number, "tokens": count, "advantage": None, "text": text})
    if not segments:
        segments.append({"problem": 0, "tokens": 7, "advantage": None, "text": "wait check wait"})
    for segment in segments if credited else []:
        segment["advantage"] = round(random.gauss(0, 1), 3)
    total = sum(segment["tokens"] for segment in segments)
    return {
        "bundle": f"evaluate/{size}/{bundle}",
        "finish": random.choice(["stop", "stop", "length"]),
        "tokens": total,
        "policy_version": 0,
        "problems": problems,
        "segments": segments,
    }


def lines(file: Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def training_folder(folder: Path, steps: int = 40, start: float = 50.0, end: float = 24.0, size: int = 3) -> None:
    """A run whose length falls until step 13 and stays there, while accuracy goes on rising."""
    folder.mkdir(parents=True)
    draw = random.Random(size)
    (folder / "config.yaml").write_text(f"output: {folder.name}\nsteps: {steps}\nbundles:\n  sizes: [{size}]\n  budget: 120\n")
    records, rollouts = [], []
    for step in range(1, steps + 1):
        fallen = min(1.0, (step - 1) / 12)
        tokens = start * (end / start) ** fallen * (1 + draw.gauss(0, 0.02))
        accuracy = 0.5 + 0.3 * fallen + 0.12 * step / steps + draw.gauss(0, 0.01)
        accuracy = min(0.99, accuracy)
        record = {**measures(accuracy, tokens), "truncated": 0.7 * (1 - fallen), "problems": 288}
        records.append({"step": step, **record, "dlogprob_max": 6e-6, "unanswered": 0.0})
        for kind in ("best", "worst"):
            rollouts.append({"step": step, "kind": kind, **transcript(draw, size, step, tokens, 0.9 if kind == "best" else 0.2, True)})
    lines(folder / "metrics.jsonl", records)
    lines(folder / "rollouts.jsonl", rollouts)


def demo_folder(folder: Path, keys: tuple[str, ...] = tuple(RUNS), complete: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    summary: dict = {"runs": {}, "seconds": 400.0, "complete": complete, "said": ["At N = 1: 54% fewer tokens.", "Not shown: a law."]}
    evaluations = []
    for key in keys:
        title, accuracy, tokens, slope = RUNS[key]
        summary[key] = {str(n): measures(accuracy - slope * (n - 1), tokens * (1 - 0.01 * n)) for n in SIZES}
        summary["runs"][key] = {"title": title, "folder": None if key == "base" else f"runs/{key}"}
        if key != "base":
            training_folder(folder / "runs" / key, end=tokens, size=3 if "bcr" in key else 1)
        for size in (1, 3):
            evaluations += [{"run": key, "size": size, **transcript(draw, size, b, tokens, accuracy, False)} for b in range(12)]
    if {"base", "bcr"} <= set(keys):
        shared = {"base": [0.8, 0.65, 0.47, 0.26], "bcr": [0.9, 0.93, 0.91, 0.59]}
        summary["shared_budget"] = {"tokens": 110, "sizes": SIZES, **shared}
    if {"bcr_tight", "same_cap"} <= set(keys):
        by_operations = {key: {str(n): measures(high - slope * n, 5.0 * n) for n in (2, 3, 4)} for key, high, slope in POOLED}
        summary["hardest"] = {"cap": 22, "operations": 4, "tokens_needed": 24.5, "by_operations": by_operations}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines(folder / "evaluations.jsonl", evaluations)
    return folder
