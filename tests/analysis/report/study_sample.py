"""A made-up study.json of three cells, one of which collapses, and a comparison of each kind."""

import json
import random
from pathlib import Path

from bcr.analysis.study import summarise_study

PROBLEMS, SIZES, CUTS = 60, [1, 2, 3], [12, 40, 110, 130]
CELLS = {  # title, accuracy and tokens per problem at N = 1
    "bcr": ("BCR: three problems <share> 120 tokens", 0.92, 22),
    "same_cap": ("The same cap, 40 tokens each", 0.95, 20),
    "penalty_2": ("Weight 2", 0.05, 3),
}


def result(name: str, seed: int, accuracy: float, tokens: int) -> dict:
    draw = random.Random(f"{name}/{seed}")
    sizes = {}
    for size in SIZES:
        lengths = [max(1, round(draw.gauss(tokens + size, 3))) for _ in range(PROBLEMS)]
        outcomes = ["c" if draw.random() < accuracy - 0.02 * size else "w" for _ in range(PROBLEMS)]
        cut = {str(budget): "".join(o if length <= budget else "u" for o, length in zip(outcomes, lengths, strict=True)) for budget in CUTS}
        right = outcomes.count("c") / PROBLEMS
        group = {"accuracy": right, "tokens": float(tokens), "problems": PROBLEMS}
        sizes[str(size)] = {
            "outcomes": "".join(outcomes),
            "tokens": lengths,
            "cut": cut,
            "accuracy": right,
            "by_difficulty": {"2": group},
            "by_position": {str(place): group for place in range(1, size + 1)},
            "tokens_correct": float(tokens),
            "tokens_wrong": None,
            "checks_per_problem": 0.1,
            "truncated": 0.0,
            "unanswered": 0.0,
            "loops_per_thousand": 1.0,
            "repetition": 0.0,
        }
    return {
        "cell": name,
        "seed": seed,
        "config": {"data.operations": [2], "bundles.sizes": [1]},
        "measurement": {"problems": PROBLEMS, "sizes": SIZES, "roomy": 130, "cut_at": CUTS},
        "seconds": {"training": 30.0, "evaluation": 8.0},
        "training": None if name == "base" else {"steps": 60, "problems": 17280, "tokens": 400_000},
        "difficulties": [2.0] * PROBLEMS,
        "sizes": sizes,
    }


def study_summary(seeds: int = 2) -> dict:
    about = {name: {"title": title, "label": name.replace("_", " "), "overrides": ["seed=<1>"]} for name, (title, _, _) in CELLS.items()}
    results = {"base": [result("base", 0, 0.85, 52)]}
    results |= {name: [result(name, seed, accuracy, tokens) for seed in range(seeds)] for name, (_, accuracy, tokens) in CELLS.items()}
    compare = [["bcr", "base"], ["bcr", "same_cap"], ["penalty_2", "base"]]
    return summarise_study("sample", "A study & its cells", about, compare, results)


def study_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study_summary()))
    return folder
