"""A checkpoint is a folder that transformers opens as it is, and that appears whole or not at all."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bcr.assemble import load_tokenizer, train_tokenizer
from bcr.model import Decoder, huggingface, load_pretrained, weights
from bcr.model.attention import PackedAttention
from bcr.model.huggingface import stop_token_ids
from bcr.runtime import checkpoint
from bcr.runtime.checkpoint import damage, save_checkpoint
from bcr.tasks.arithmetic import build_tokenizer

TEXTS = ["Tom has 3 apples and buys 12 more; how many apples has Tom?", "A train goes 80 km in 2 hours. How fast is it?"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def model(make_decoder, tokenizer: Tokenizer) -> Decoder:
    return make_decoder(vocab_size=tokenizer.get_vocab_size())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@torch.no_grad()
def test_transformers_opens_it(model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    eos = tokenizer.token_to_id("<eos>")
    folder = save_checkpoint(model, tokenizer, (eos,), tmp_path / "checkpoints" / "step-000001", "# A card\n")
    assert folder == tmp_path / "checkpoints" / "step-000001"
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token_id, theirs.bos_token, theirs.pad_token) == (eos, "<bos>", "<pad>")
    assert theirs.model_max_length == model.config.max_position_embeddings
    ids = theirs(TEXTS[0]).input_ids
    assert ids == tokenizer.encode(TEXTS[0]).ids == load_tokenizer(folder).encode(TEXTS[0]).ids
    assert theirs.decode(ids) == TEXTS[0]
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.bos_token_id) == (eos, tokenizer.token_to_id("<bos>"))
    tokens = torch.tensor(ids)
    ours = model(tokens, torch.arange(len(ids)), PackedAttention([len(ids)], torch.device("cpu"))) @ model.head_weight.T
    peer = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(peer(tokens[None]).logits[0], ours, rtol=0, atol=1e-4)
    assert all(torch.equal(new, old) for new, old in zip(load_pretrained(folder).parameters(), model.parameters(), strict=True))
    assert (folder / "README.md").read_text() == "# A card\n"


def test_several_stop_tokens_are_kept(model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tokenizer, (2, 7), tmp_path / "saved", "")
    assert stop_token_ids(folder) == [2, 7]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 7]
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 2


def test_a_loaded_model_keeps_its_own_tokenizer_files(model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Byte for byte, whatever another version of `tokenizers` would write; and its chat template."""
    first = save_checkpoint(model, tokenizer, (2, 7), tmp_path / "first", "")
    (first / "tokenizer.json").write_text((first / "tokenizer.json").read_text() + "\n\n")
    (first / "chat_template.jinja").write_text("{{ messages[0].content }}")
    second = save_checkpoint(load_pretrained(first), tokenizer, (2, 7), tmp_path / "second", "another card")
    changed = {"README.md": b"another card", "checksums.sha256": contents(second)["checksums.sha256"]}
    assert contents(second) == contents(first) | changed


def test_the_tokenizer_of_the_embedded_world_survives(make_decoder, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = make_decoder(vocab_size=tokenizer.get_vocab_size())
    folder = save_checkpoint(model, tokenizer, (tokenizer.token_to_id("<eos>"),), tmp_path / "saved", "")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.get_vocab() == tokenizer.get_vocab() == load_tokenizer(folder).get_vocab()
    assert theirs.eos_token == "<eos>"


def test_a_new_checkpoint_takes_the_place_of_the_old(model: Decoder, make_decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_checkpoint(model, tokenizer, (2,), folder, "old")
    (folder / "left over").write_text("from the old one")
    other = make_decoder(seed=5, vocab_size=tokenizer.get_vocab_size())
    save_checkpoint(other, tokenizer, (2,), folder, "new")
    assert torch.equal(load_pretrained(folder).embed_tokens.weight, other.embed_tokens.weight)
    assert (folder / "README.md").read_text() == "new"
    assert not (folder / "left over").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_a_partial_folder_of_a_killed_run_is_no_obstacle(model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / ".saved.partial").mkdir()
    (tmp_path / ".saved.partial" / "rubbish").write_text("rubbish")
    folder = save_checkpoint(model, tokenizer, (2,), tmp_path / "saved", "")
    assert "rubbish" not in contents(folder)
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
def test_damage_to_any_file_is_seen(harm: Callable[[Path], None], model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = save_checkpoint(model, tokenizer, (2,), tmp_path / "saved", "a card", add=lambda place: (place / "more").mkdir())
    assert damage(folder) is None
    assert subprocess.run(["sha256sum", "--check", "--quiet", "checksums.sha256"], cwd=folder).returncode == 0
    for name in contents(folder).keys() - {"checksums.sha256"}:
        content = (folder / name).read_bytes()
        harm(folder / name)
        assert damage(folder) is not None, name
        (folder / name).write_bytes(content)
    assert damage(folder) is None
    flip(folder / "checksums.sha256")
    assert damage(folder) is not None
    (folder / "checksums.sha256").write_text("")
    assert damage(folder) == "checksums.sha256 is empty"


@pytest.mark.parametrize("fail", [False, True])
def test_a_checkpoint_set_aside_by_a_killed_run_is_not_lost(
    fail: bool, model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two renames leaves the old one beside its place: the next save replaces it, or puts it back where it fails."""
    folder = save_checkpoint(model, tokenizer, (2,), tmp_path / "saved", "old")
    folder.rename(tmp_path / ".saved.previous")
    with monkeypatch.context() as patch:
        if fail:
            FAILURES["weights"](patch, full_disk)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(model, tokenizer, (2,), folder, "new")
        else:
            save_checkpoint(model, tokenizer, (2,), folder, "new")
    assert (folder / "README.md").read_text() == ("old" if fail else "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_nothing_stands_at_its_place_before_it_is_whole(
    model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []
    sync = checkpoint.sync

    def watched(path: Path) -> None:
        seen.append((path.name, (tmp_path / "saved").exists()))
        sync(path)

    monkeypatch.setattr(checkpoint, "sync", watched)
    folder = save_checkpoint(model, tokenizer, (2,), tmp_path / "saved", "")
    before = {name for name, there in seen if not there}
    assert before == {*contents(folder), ".saved.partial"}  # every file and the folder had reached the disk before it appeared
    assert seen[-1] == (tmp_path.name, True)  # and the renaming reached it too


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def only_for(name: str, fail: Callable[..., None], original: Callable[..., object]) -> Callable[..., object]:
    """`original`, except that it fails for paths whose name begins so."""
    return lambda path, *rest, **more: (fail if Path(path).name.startswith(name) else original)(path, *rest, **more)


FAILURES: dict[str, Callable[[pytest.MonkeyPatch, Callable[..., None]], None]] = {
    "weights": lambda patch, fail: patch.setattr(weights, "save_file", fail),
    "config": lambda patch, fail: patch.setattr(huggingface, "write_json", fail),
    "tokenizer": lambda patch, fail: patch.setattr(checkpoint, "tokenizer_config", fail),
    "card": lambda patch, fail: patch.setattr(Path, "write_text", only_for("README", fail, Path.write_text)),
    "flush": lambda patch, fail: patch.setattr(os, "fsync", fail),
    "rename": lambda patch, fail: patch.setattr(Path, "rename", only_for(".saved.partial", fail, Path.rename)),
    "setting the old one aside": lambda patch, fail: patch.setattr(Path, "rename", only_for("saved", fail, Path.rename)),
}


@pytest.mark.parametrize("fail", [full_disk, interrupted])
@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_leaves_the_previous_checkpoint_as_it_was(
    where: str,
    fail: Callable[..., None],
    model: Decoder,
    make_decoder,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "saved"
    save_checkpoint(model, tokenizer, (2,), folder, "old")
    old = contents(folder)
    other = make_decoder(seed=5, vocab_size=tokenizer.get_vocab_size())
    with monkeypatch.context() as patch:
        FAILURES[where](patch, fail)
        with pytest.raises((OSError, KeyboardInterrupt)):
            save_checkpoint(other, tokenizer, (2,), folder, "new")
    assert contents(folder) == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]
    save_checkpoint(other, tokenizer, (2,), folder, "new")
    assert (folder / "README.md").read_text() == "new"


@pytest.mark.parametrize("where", sorted(FAILURES.keys() - {"setting the old one aside"}))
def test_a_first_checkpoint_that_fails_leaves_nothing(
    where: str, model: Decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        FAILURES[where](patch, full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(model, tokenizer, (2,), tmp_path / "saved", "")
    assert list(tmp_path.iterdir()) == []


def test_an_old_checkpoint_is_whole_until_the_new_one_stands(
    model: Decoder, make_decoder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill cannot be caught: at the moment when anything is deleted, a whole checkpoint must stand at the folder."""
    folder = tmp_path / "saved"
    save_checkpoint(model, tokenizer, (2,), folder, "old")
    names, deletions = set(contents(folder)), []
    rmtree = shutil.rmtree

    def watched(path: Path, *rest: object, **more: object) -> None:
        if Path(path).exists():
            deletions.append(Path(path).name)
            assert set(contents(folder)) == names
            assert Path(path) != folder
        rmtree(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "rmtree", watched)
    save_checkpoint(make_decoder(seed=5, vocab_size=tokenizer.get_vocab_size()), tokenizer, (2,), folder, "new")
    assert len(deletions) == 1
