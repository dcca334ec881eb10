"""From a checked config to the things a program works with: decoder, dialect, problems."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bcr.model import Decoder, DecoderConfig, load_pretrained
from bcr.model.huggingface import read_config, resolve, stop_token_ids
from bcr.model.lora_config import adapt
from bcr.records import Problem
from bcr.runtime.config import config_folder, typed
from bcr.runtime.schema import BundleConfig, DataConfig, DialectConfig, GradingConfig, ModelConfig, RandomModel, SamplingConfig
from bcr.runtime.stop import first_here
from bcr.sampler import Sampler, SamplingParams
from bcr.tasks.arithmetic import ArithmeticDialect, ArithmeticProblems
from bcr.tasks.arrangement import ArrangedBundles
from bcr.tasks.bundles import Budget, BundleStream, Problems, SeparateContexts, Stream, longest_prompt
from bcr.tasks.chat import read_chat_template
from bcr.tasks.contamination import Overlap, overlaps
from bcr.tasks.dialect import Dialect
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.problems import Columns, ShuffledProblems, read_file, read_hub
from bcr.tasks.text import TextDialect

BUILTIN = "builtin/"  # model.path=builtin/arithmetic-base: a checkpoint that ships with the package


@dataclass
class Task:
    """What is trained or measured. `problems` is endless; `finite` is the data set's list where there is one.

    `excluded` are the problems that were left out of it because a benchmark of `data.exclude` holds them.
    """

    model: Decoder
    dialect: Dialect
    problems: Problems
    finite: list[Problem] | None
    excluded: list[Overlap] = field(default_factory=list)


def assemble(model: ModelConfig, data: DataConfig, dialect: DialectConfig, seed: int, device: torch.device) -> Task:
    """Load or make everything. ValueError, with one sentence, for whatever does not fit together."""
    if data.kind not in ("arithmetic", "dataset"):
        raise ValueError(f"data.kind is {data.kind!r}; it must be 'arithmetic' or 'dataset'.")
    if data.split not in ("train", "heldout"):
        raise ValueError(f"data.split is {data.split!r}; it must be 'train' or 'heldout'.")
    if (model.path is None) == (model.random is None):
        raise ValueError("model.path and model.random: give exactly one of them.")
    dtype = working_dtype(model.dtype, device)
    model.lora.adapter(model.path)  # its checks come before anything is read
    finite, excluded = decontaminated(data) if data.kind == "dataset" else (None, [])
    problems: Problems = ShuffledProblems(finite, seed) if finite else ArithmeticProblems(data.split, seed, data.operations)  # type: ignore[arg-type]
    if model.random is None:
        return Task(*load_model(model, data.kind, dialect, device, seed), problems, finite, excluded)
    if finite is None:
        raise ValueError("model.random trains its tokenizer on the data's text: use it with data=jsonl or another data set.")
    tokenizer = train_tokenizer([f"{problem.question}\n{problem.answer}" for problem in finite], model.random.vocab_size)
    vocabulary = tokenizer.get_vocab()
    decoder = random_decoder(model.random, len(vocabulary), seed).to(device, dtype)
    adapt(decoder, model.lora, model.path, seed)
    decoder.activation_checkpointing = model.activation_checkpointing
    spoken = TextDialect(tokenizer, [vocabulary["<eos>"]], dialect.form, None, dialect.answers_in_thinking)
    return Task(decoder, spoken, problems, finite, excluded)


def load_model(model: ModelConfig, kind: str, dialect: DialectConfig, device: torch.device, seed: int = 0) -> tuple[Decoder, Dialect]:
    """The checkpoint at `model.path` and the dialect it is spoken to in: that of the embedded world where `kind` is "arithmetic".

    `seed` is that of new adapters, where `model.lora` asks for them.
    """
    assert model.path is not None
    model.lora.adapter(model.path)  # its checks come before anything is loaded
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
    adapt(decoder, model.lora, model.path, seed)
    decoder.activation_checkpointing = model.activation_checkpointing
    return decoder, spoken


def working_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights that trainer and sampler compute with: "auto" is bfloat16 on CUDA and float32 on a CPU."""
    dtypes = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise ValueError(f"model.dtype is {name!r}; it must be one of {', '.join(dtypes)}.")
    return dtypes[name]


def data_set(entry: str, like: DataConfig) -> DataConfig:
    """What an entry of `benchmarks` or `data.exclude` names: a data set of configs/data/, or a file with the columns of `like`."""
    preset = config_folder() / "data" / f"{entry}.yaml"
    if Path(entry).name == entry and preset.exists():
        return typed(OmegaConf.create(OmegaConf.to_container(OmegaConf.load(preset))), DataConfig)  # type: ignore[arg-type]
    return replace(like, kind="dataset", path=entry, hub=None, exclude=[])


def read_problems(data: DataConfig) -> list[Problem]:
    """All problems of `data.path`, or else of `data.hub`."""
    columns = Columns(data.question, data.answer, data.id, data.difficulty, data.answer_form)
    if data.path is not None:
        return read_file(data.path, columns)
    if data.hub is None:
        raise ValueError("data.path is null and so is data.hub; a data set needs a file or a hub name.")
    return read_hub(data.hub, data.subset, data.hub_split, columns)


def decontaminated(data: DataConfig) -> tuple[list[Problem], list[Overlap]]:
    """The problems without those that a benchmark of `data.exclude` holds, and those; what is left out is told on stderr."""
    problems = read_problems(data)
    excluded: dict[str, Overlap] = {}
    for entry in data.exclude:
        found = overlaps(problems, read_problems(data_set(entry, data)), data.exclude_ngram, data.exclude_share)
        excluded |= {overlap.id: overlap for overlap in found}
        if first_here():
            print(f"data: {len(found):,} of {len(problems):,} problems are in {entry} and left out", file=sys.stderr)
    kept = [problem for problem in problems if problem.id not in excluded]
    if not kept:
        raise ValueError(f"data.exclude leaves none of the {len(problems)} problems; was the benchmark itself given as data?")
    return kept, list(excluded.values())


def build_bundles(task: Task, settings: BundleConfig, sizes: Mapping[int, float], budget: Budget, seed: int) -> Stream:
    """The stream of bundles that `bundles.arrangement`, `bundles.count` and `bundles.contexts` ask for."""
    if settings.contexts not in ("shared", "separate"):
        raise ValueError(f"bundles.contexts is {settings.contexts!r}; it must be 'shared' or 'separate'.")
    bundles: Stream
    if settings.arrangement == "mixed" and settings.count is None:
        bundles = BundleStream(task.problems, task.dialect, sizes, budget, seed)
    elif task.finite is None:
        raise ValueError("bundles.arrangement and bundles.count need a data set; the embedded world has no end to arrange.")
    else:
        bundles = ArrangedBundles(task.finite, task.dialect, sizes, budget, settings.arrangement, settings.count, seed)
    return SeparateContexts(bundles, task.dialect) if settings.contexts == "separate" else bundles


def check_context(task: Task, sizes: Iterable[int], budget: Budget, problems: Sequence[Problem] | None = None) -> int:
    """Tokens of the longest prompt (of `problems`, or else of the task's) with its budget. ValueError where they cannot fit the context."""
    context = task.model.config.max_position_embeddings
    asked = problems or task.finite or [task.problems[index] for index in range(64)]
    longest = 0
    for size in sizes:
        new = budget.tokens(size)
        prompt = longest_prompt(asked, task.dialect, size)
        if prompt + new > context:
            raise ValueError(
                f"N = {size} needs {prompt + new} positions ({prompt} for the longest prompt, and its budget of {new} new tokens, "
                f"max_new_tokens); the model's context is {context}."
            )
        longest = max(longest, prompt + new)
    return longest


def build_sampler(model: Decoder, settings: SamplingConfig, learner: bool = False) -> Sampler:
    """`learner`: the process also trains the model, and will hold a gradient and two moments in float32 of each weight that it trains."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad) if learner else 0
    return Sampler(
        model,
        max_batch=settings.max_batch,
        row_block=settings.row_block,
        cache_mb=settings.cache_mb,
        invariant=settings.invariant,
        learner_bytes=12 * trained,
    )


def sampling_params(settings: SamplingConfig, n: int, dialect: Dialect, seed: int) -> SamplingParams:
    """`n` samples a prompt as the settings say; training refuses cut distributions before it comes here."""
    return SamplingParams(
        settings.temperature, n, dialect.stop_token_ids, seed, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p
    )


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
