"""Checkpoints on disk: a folder in Hugging Face layout that appears whole or not at all, and that can tell when it was damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from bcr.model import Decoder, save_pretrained

CHECKSUMS = "checksums.sha256"  # of every other file, in the format of `sha256sum --check`


def save_checkpoint(
    model: Decoder,
    tokenizer: Tokenizer,
    stop_token_ids: tuple[int, ...],
    folder: Path,
    card: str,
    add: Callable[[Path], None] | None = None,
) -> Path:
    """Write weights, configs, tokenizer and model card (`README.md`) to a temporary folder beside `folder`, then rename it.

    `add(temporary)` may write more files there. A checksum of every file is written last.
    A failure (a full disk: OSError; an interrupt) leaves whatever stood at `folder` before as it was. A kill between the two renames, which
    no code can survive, leaves it whole beside `folder` as `.<name>.previous`; the next save at that place puts it back first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, previous = partial_of(folder), folder.with_name(f".{folder.name}.previous")
    if previous.exists() and not folder.exists():
        previous.rename(folder)
    for left_over in (temporary, previous):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        bos = tokenizer.token_to_id("<bos>")
        stops = list(stop_token_ids)
        save_pretrained(model, temporary, eos_token_id=stops[0] if len(stops) == 1 else stops, bos_token_id=bos)
        if "tokenizer.json" not in model.companions:  # else it came with the model and is there, word for word
            tokenizer.save(str(temporary / "tokenizer.json"))
            (temporary / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, stops[0], model), indent=2) + "\n")
        (temporary / "README.md").write_text(card)
        if add is not None:
            add(temporary)
        (temporary / CHECKSUMS).write_text("".join(f"{checksum(file)}  {file.relative_to(temporary)}\n" for file in files_of(temporary)))
        for entry in (*files_of(temporary), *(entry for entry in temporary.rglob("*") if entry.is_dir()), temporary):
            sync(entry)
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        raise
    shutil.rmtree(previous, ignore_errors=True)
    return folder


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is written before it is renamed to `folder`."""
    return folder.with_name(f".{folder.name}.partial")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint of ours, in a few words; None where every file is there and is what was written."""
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
        for line in lines:
            expected, _, name = line.partition("  ")
            if checksum(folder / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return None if lines else f"{CHECKSUMS} is empty"


def files_of(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tokenizer_config(tokenizer: Tokenizer, eos: int, model: Decoder) -> dict[str, object]:
    special = {"bos_token": "<bos>", "pad_token": "<pad>"}
    present = {name: token for name, token in special.items() if tokenizer.token_to_id(token) is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **present,
        "eos_token": tokenizer.id_to_token(eos),
        "model_max_length": model.config.max_position_embeddings,
    }


def sync(path: Path) -> None:
    """Flush to disk, so that the rename cannot overtake the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
