"""The bundled model's own tokenizer: a sentencepiece vocabulary and a chat template."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
MARKS = [END, SYSTEM, USER, ASSISTANT]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% elif message['role'] in ('system', 'user') %}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] | lower + '<|end|>' }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def as_read(message: Mapping[str, str]) -> str:
    """A message's text as the model sees it. What is said to it is read in lower case, here and in
    TEMPLATE: a name has one spelling to learn, not four."""
    text = message["content"]
    return text if message["role"] == "assistant" else text.lower()


def train_vocabulary(texts: Iterable[str], size: int) -> bytes:
    """A sentencepiece BPE model of ``size`` pieces: digits alone, byte fallback, no leading space,
    nothing normalized, so that every text comes back as it was."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=out,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        user_defined_symbols=MARKS,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def write_tokenizer(folder: Path, model: bytes) -> None:
    """tokenizer.model, tokenizer_config.json and chat_template.jinja."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(model)
    added = {
        str(pieces.piece_to_id(mark)): {
            "content": mark, "special": True, "lstrip": False, "rstrip": False,
            "normalized": False, "single_word": False,
        }
        for mark in MARKS
    }  # fmt: skip
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "unk_token": "<unk>",
        "eos_token": END,
        "pad_token": END,
        "added_tokens_decoder": added,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE + "\n")
