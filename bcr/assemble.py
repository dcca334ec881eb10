"""From a checked config to the things a program works with: decoder, dialect, problems."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bcr.model import Decoder, DecoderConfig, load_pretrained
from bcr.model.huggingface import read_config, resolve, stop_token_ids
from bcr.records import Problem
from bcr.runtime.schema import DataConfig, DialectConfig, GradingConfig, ModelConfig, RandomModel, SamplingConfig
from bcr.sampler import Sampler
from bcr.tasks.arithmetic import ArithmeticDialect, ArithmeticProblems
from bcr.tasks.bundles import Budget, Problems, longest_prompt
from bcr.tasks.chat import read_chat_template
from bcr.tasks.dialect import Dialect
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.problems import ShuffledProblems, read_jsonl
from bcr.tasks.text import TextDialect

BUILTIN = "builtin/"  # model.path=builtin/arithmetic-base: a checkpoint that ships with the package


@dataclass
class Task:
    """What is trained or measured. `problems` is endless; `finite` is the file's list where there is a file."""

    model: Decoder
    dialect: Dialect
    problems: Problems
    finite: list[Problem] | None


def assemble(model: ModelConfig, data: DataConfig, dialect: DialectConfig, seed: int, device: torch.device) -> Task:
    """Load or make everything. ValueError, with one sentence, for whatever does not fit together."""
    if data.kind not in ("arithmetic", "jsonl"):
        raise ValueError(f"data.kind is {data.kind!r}; it must be 'arithmetic' or 'jsonl'.")
    if data.split not in ("train", "heldout"):
        raise ValueError(f"data.split is {data.split!r}; it must be 'train' or 'heldout'.")
    if (model.path is None) == (model.random is None):
        raise ValueError("model.path and model.random: give exactly one of them.")
    if data.kind == "jsonl" and data.path is None:
        raise ValueError("data.path is null; data.kind=jsonl needs a file.")
    dtype = working_dtype(model.dtype, device)
    finite = read_jsonl(data.path, data.question, data.answer) if data.kind == "jsonl" and data.path else None
    problems: Problems = ShuffledProblems(finite, seed) if finite else ArithmeticProblems(data.split, seed, data.operations)  # type: ignore[arg-type]
    if model.random is None:
        return Task(*load_model(model, data.kind, dialect, device), problems, finite)
    if finite is None:
        raise ValueError("model.random trains its tokenizer on the data's text: use it with data.kind=jsonl.")
    tokenizer = train_tokenizer([f"{problem.question}\n{problem.answer}" for problem in finite], model.random.vocab_size)
    vocabulary = tokenizer.get_vocab()
    decoder = random_decoder(model.random, len(vocabulary), seed).to(device, dtype)
    decoder.activation_checkpointing = model.activation_checkpointing
    spoken = TextDialect(tokenizer, [vocabulary["<eos>"]], dialect.form, None, dialect.answers_in_thinking)
    return Task(decoder, spoken, problems, finite)


def load_model(model: ModelConfig, kind: str, dialect: DialectConfig, device: torch.device) -> tuple[Decoder, Dialect]:
    """The checkpoint at `model.path` and the dialect it is spoken to in: that of the embedded world where `kind` is "arithmetic"."""
    assert model.path is not None
    folder = model_folder(model.path)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the model only {config.vocab_size}.")
    spoken: Dialect
    if kind == "arithmetic":
        spoken = ArithmeticDialect(tokenizer)
    else:
        chat = read_chat_template(folder, dialect.system, dialect.thinking) if dialect.chat else None
        spoken = TextDialect(tokenizer, stop_token_ids(folder), dialect.form, chat, dialect.answers_in_thinking)
    decoder = load_pretrained(folder, dtype=working_dtype(model.dtype, device), device=device)
    decoder.activation_checkpointing = model.activation_checkpointing
    return decoder, spoken


def working_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights that trainer and sampler compute with: "auto" is bfloat16 on CUDA and float32 on a CPU."""
    dtypes = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"model.dtype is {name!r}; it must be one of {', '.join(dtypes)}.")
    return dtypes[name]


def check_context(task: Task, sizes: Iterable[int], budget: Budget) -> None:
    """Raise ValueError where the longest prompt and its budget cannot fit the model's context."""
    context = task.model.config.max_position_embeddings
    for size in sizes:
        new = budget.tokens(size)
        prompt = longest_prompt(task.finite or [task.problems[index] for index in range(64)], task.dialect, size)
        if prompt + new > context:
            raise ValueError(
                f"N = {size} needs {prompt + new} positions ({prompt} for the longest prompt, and its budget of {new} new tokens, "
                f"max_new_tokens); the model's context is {context}."
            )


def build_sampler(model: Decoder, settings: SamplingConfig) -> Sampler:
    return Sampler(model, max_batch=settings.max_batch, row_block=settings.row_block, cache_mb=settings.cache_mb)


def build_grader(settings: GradingConfig) -> GraderPool:
    return GraderPool(settings.workers, settings.deadline_s, settings.memory_mb)


def model_folder(path: str) -> Path:
    """The folder of a checkpoint: built in, local, or fetched from the hub."""
    if path.startswith(BUILTIN):
        folder = Path(__file__).parent / "assets" / path.removeprefix(BUILTIN)
        if not folder.is_dir():
            known = ", ".join(f"{BUILTIN}{found.name}" for found in sorted(folder.parent.glob("*/")))
            raise ValueError(f"model.path is {path!r}; built in are: {known}.")
        return folder
    return resolve(path)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a checkpoint folder."""
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ValueError(f"{folder}: there is no tokenizer.json; slow tokenizers are not supported.")
    return Tokenizer.from_file(str(file))


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the texts, with <pad>, <bos>, <eos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def random_decoder(sizes: RandomModel, vocab_size: int, seed: int) -> Decoder:
    return Decoder(DecoderConfig(**{**vars(sizes), "vocab_size": vocab_size})).init_weights(seed)
