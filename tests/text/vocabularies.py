"""Small vocabularies of every kind the tokenizer reads, made on the spot."""

from __future__ import annotations

import io
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "The lamp on the table was still warm when they came home.",
    "Numbers: 12 345, and 6.5! Is it so? (Yes.)",
    "größer, naïve, 你好世界, Привет, 👩‍🚀 and 👍🏽",
    "  two spaces\n\n\tand tabs",
] * 4
SPECIAL = ["<s>", "</s>", "<|turn|>"]


def byte_level() -> Tokenizer:
    """GPT-2's kind: bytes as printable stand-ins."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<tool>", "two words", "größer"])
    return tokenizer


def byte_fallback(prepend: str = "first") -> Tokenizer:
    """Llama 2's kind: spaces as marks, unknown characters as <0xNN>."""
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "▁The", "▁lamp", "lamp", "e", "a", "t", "h", "▁▁", "\n", "é", "▁on"]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *words])}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in [*SPECIAL, "<unk>"]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=250, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def words() -> Tokenizer:
    """No decoder at all."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "one", "two", "three"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def wordpiece() -> Tokenizer:
    """A decoder that the streaming steps do not know."""
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "##b": 1, ".": 2}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "words": words,
    "wordpiece": wordpiece,
}


def sentencepiece_model(
    path: Path, *, kind: str = "bpe", leading_space: bool = True, collapse: bool = False
) -> Path:
    """Trains a sentencepiece model with byte fallback and writes ``tokenizer.model``."""
    import sentencepiece

    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=data,
        vocab_size=340,
        model_type=kind,
        byte_fallback=True,
        character_coverage=0.98,
        add_dummy_prefix=leading_space,
        remove_extra_whitespaces=collapse,
        normalization_rule_name="identity",
        user_defined_symbols=["<user>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file = path / "tokenizer.model"
    file.write_bytes(data.getvalue())
    return file
