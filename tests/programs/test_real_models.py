"""Checkpoints as they come from the hub, with a chat template: trained on real rows, loaded by transformers, measured on benchmarks.

The weights are random, so nothing is learnt and hardly anything answered: what is shown is that every part fits the next.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from bcr.evaluate import evaluate, prepare, table, verdict_table
from bcr.runtime.config import compose
from bcr.runtime.schema import EvaluateConfig, TrainConfig
from bcr.train import prepare as prepare_training
from bcr.train import train

DATA = Path(__file__).parents[3] / "shared" / "data"
BENCHMARKS = ("aime25", "amc23", "minerva", "math500", "olympiadbench")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}
QWEN_WORDS = (  # transformers builds Qwen tokenizers with it, whatever tokenizer.json says
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def rows(name: str, count: int) -> list[dict]:
    """Real rows where they are, and rows of their kind where they are not."""
    file = DATA / name
    if file.exists():
        return [json.loads(line) for line in file.read_text().splitlines()[:count]]
    return [
        {"problem": f"Find $\\frac{{{n}}}{{2}} + {n}$ for Ann's {n} apples.", "answer": f"\\frac{{{3 * n}}}{{2}}"} for n in range(count)
    ]


def write(file: Path, records: list[dict]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "train.jsonl", rows("train/math.jsonl", 60))


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def checkpoint(request, tmp_path_factory, problems) -> Path:
    """A folder as transformers writes it: random weights, a byte-level BPE tokenizer, a template like Qwen's, two EOS ids."""
    folder = tmp_path_factory.mktemp(request.param)
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [json.loads(line)["problem"] for line in problems.read_text().splitlines()],
        trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = CONFIGS[request.param]
    config.vocab_size = len(tokenizer) + 7  # padded, as vocabularies are
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.config.eos_token_id = model.generation_config.eos_token_id = stops
    model.save_pretrained(folder)
    return folder


def test_two_steps_of_training_and_back_into_transformers(checkpoint, problems, tmp_path):
    """Accuracy alone would teach random weights nothing; a length penalty gives their rollouts different scores, so weights do change."""
    overrides = [
        f"output={tmp_path / 'run'}",
        "model=folder",
        f"model.path={checkpoint}",
        "data=jsonl",
        f"data.path={problems}",
        "dialect.thinking=false",
        "device=cpu",
        "steps=2",
        "bundles.budget=40",
        "bundles.per_step=2",
        "bundles.group=4",
        "bundles.arrangement=mixed",
        "bundles.count=4",
        "optimizer.lr=1e-2",
        "sampling.row_block=8",
        "reward.kind=linear_penalty",
        "reward.coefficient=1.0",
        "reward.length=40",
        "sampling.temperature=3.0",
    ]
    run = prepare_training(compose("train", overrides, TrainConfig))
    train(run)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["problems"] for step in steps] == [24, 24]
    assert sum(step["updated"] for step in steps) > 0
    assert all(step["dlogprob_max"] < 1e-3 for step in steps)
    assert all(math.isfinite(value) for step in steps for value in step.values() if value is not None)

    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32), AutoTokenizer.from_pretrained(saved)
    assert tokenizer.chat_template == TEMPLATE
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not torch.equal(theirs.lm_head.weight, base.lm_head.weight)
    dialect, (bundle,) = run.task.dialect, run.rollouts.bundles.take(1)
    message = [{"role": "user", "content": dialect.ask(bundle.problems)}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, enable_thinking=False)["input_ids"]
    assert prompt == bundle.prompt_ids
    text = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert text.shape[1] > len(prompt)


def five_benchmarks(folder: Path, count: int | None) -> list[Path]:
    if count is None and DATA.exists():
        return [DATA / "eval" / f"{name}.jsonl" for name in BENCHMARKS]
    return [write(folder / f"{name}.jsonl", rows(f"eval/{name}.jsonl", count or 10)) for name in BENCHMARKS]


def test_the_five_benchmarks_give_a_whole_table(checkpoint, tmp_path):
    files = five_benchmarks(tmp_path, 7)
    options = ["sizes=[1,2,3]", "budgets=[12]", "budgets_per_problem=[]", "device=cpu", "sampling.row_block=8"]
    overrides = ["model=folder", f"model.path={checkpoint}", f"benchmarks=[{','.join(map(str, files))}]", *options]
    cells = evaluate(prepare(compose("evaluate", overrides, EvaluateConfig)))
    assert [(Path(cell["data"]).stem, cell["n"]) for cell in cells] == [(name, n) for name in BENCHMARKS for n in (1, 2, 3)]
    assert all(sum(cell["verdicts"].values()) == cell["problems"] == 7 for cell in cells)
    assert len(table(cells).rows) == len(verdict_table(cells).rows) == 15


@pytest.mark.slow
def test_the_program_measures_all_problems_of_the_five_benchmarks(checkpoint, tmp_path):
    files = five_benchmarks(tmp_path, None)
    options = [
        "problems=null",
        "sizes=[1,2,3]",
        "budgets=[16]",
        "budgets_per_problem=[]",
        "device=cpu",
        f"output={tmp_path / 'result.json'}",
    ]
    command = [
        sys.executable,
        "-m",
        "bcr.evaluate",
        "model=folder",
        f"model.path={checkpoint}",
        f"benchmarks=[{','.join(map(str, files))}]",
    ]
    wide = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=wide, timeout=280)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "result.json").read_text())["cells"]
    counts = [sum(1 for _ in file.open()) for file in files for _ in range(3)]
    assert [cell["problems"] for cell in cells] == counts
    assert all(sum(cell["verdicts"].values()) == cell["problems"] for cell in cells)
    assert all(name in done.stdout for name in BENCHMARKS)
