"""What the tests of reading share: whose a token is, and three kinds of tokenizer."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from bcr.tasks.text import TextDialect

calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

finishes = st.sampled_from(["stop", "length"])


def owners(segments):
    """The problem of every token, after checking that the segments lie end to end from 0 on and none is empty."""
    spread, expected_start = [], 0
    for segment in segments:
        assert segment.start == expected_start < segment.stop
        spread += [segment.problem] * (segment.stop - segment.start)
        expected_start = segment.stop
    return spread


def owners_by_marks(marks, length):
    """The same from (token, problem) marks: a token belongs to the last mark at or before it, early ones to the first mark."""
    first = marks[0][1] if marks else 0
    return [next((problem for place, problem in reversed(marks) if place <= token), first) for token in range(length)]


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer():
    """Every byte is a token: markers and characters are all split."""
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(["<eos>", *ALPHABET])}, []))
    return as_byte_level(tokenizer)


def as_byte_level(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def merging_tokenizer():
    """Byte-level BPE with tokens that end inside a marker, that hold the end of an answer and a marker, and that hold two markers."""
    tokenizer = as_byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(
        ["### Problem 1\n漢 é 🙂 1 + a\nAnswer 1: \\boxed{1}\n\n## Problem 2\nAnswer 2: $\\boxed{a}$"] * 3, trainer
    )
    wide = [
        "}\n### Pro",
        "a\n### Problem 1",
        "\n### Problem 2\n#### Problem 3\n",
        "Answer 2: \\boxed{1}Answer 1: \\boxed{",
        "1}",
        "lem 2\n漢",
    ]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in wide])
    return tokenizer


def fallback_tokenizer():
    """Characters, and bytes where a character is missing (SentencePiece): bytes that are no UTF-8 change what stood before them."""
    characters = ["\n", *"#Problem123Answer4:\\boxd{} .+=", "▁"]
    vocabulary = {
        piece: index for index, piece in enumerate(dict.fromkeys(["<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]))
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<eos>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def byte_letters():
    """The letter that stands for each byte in a byte-level vocabulary: printable bytes for themselves, the others from 256 on in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + place) for place, byte in enumerate(others)}}


BYTE_LETTERS = byte_letters()
BYTES, MERGING, FALLBACK = byte_tokenizer(), merging_tokenizer(), fallback_tokenizer()
TOKENIZERS = {"bytes": BYTES, "merging": MERGING, "fallback": FALLBACK}
EOS = 0


def dialect_of(tokenizer):
    return TextDialect(tokenizer, [EOS])
