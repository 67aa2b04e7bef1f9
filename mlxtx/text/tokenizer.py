"""A checkpoint's tokenizer: text to token ids and back, chat prompts, end-of-sequence ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxtx.errors import MlxtxError
from mlxtx.files import read_json_object, read_text
from mlxtx.text.backends import AddedToken, Pieces, SentencePieces, TokenizersPieces
from mlxtx.text.chat_template import ChatTemplate, Message, plain_transcript
from mlxtx.text.detokenizer import StreamingDetokenizer

_NAMED = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")


class Tokenizer:
    """Made by ``Tokenizer.load(folder)`` from the files that stand beside a model's weights.

    ``eos_ids`` are all ids that end a sequence, gathered from ``generation_config.json``,
    ``config.json`` and the tokenizer. ``chat_template`` is None when the model has none.
    """

    def __init__(
        self,
        pieces: Pieces,
        *,
        named: Mapping[str, str] | None = None,
        eos_ids: frozenset[int] = frozenset(),
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self.pieces = pieces
        self.named = dict(named or {})  # "bos_token" -> "<s>" ...
        self.eos_ids = eos_ids
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.chat_template = chat_template

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads the tokenizer files of a checkpoint folder."""
        folder = Path(folder)
        config = _json(folder / "tokenizer_config.json")
        special_map = _json(folder / "special_tokens_map.json")
        added = _added_tokens(folder, config)
        pieces: Pieces
        add_bos, add_eos = config.get("add_bos_token"), config.get("add_eos_token")
        if (folder / "tokenizer.json").is_file():
            pieces = TokenizersPieces(folder / "tokenizer.json", added)
            defaults: dict[str, str] = {}  # tokenizer.json knows by itself
        elif (folder / "tokenizer.model").is_file():
            legacy = bool(config.get("legacy", False))
            pieces = SentencePieces(folder / "tokenizer.model", added, legacy=legacy)
            inner = pieces.inner
            defaults = {
                f"{name}_token": inner.id_to_piece(token)
                for name, token in (("bos", inner.bos_id()), ("eos", inner.eos_id()))
                if token >= 0
            }
            add_bos = "bos_token" in defaults if add_bos is None else bool(add_bos)
            add_eos = bool(add_eos)
        else:
            raise MlxtxError(
                f"{folder} has no tokenizer.json and no tokenizer.model; copy the model's tokenizer"
                " files there, or load the weights alone with mlxtx.load_model"
            )
        named = dict(defaults)
        for name in _NAMED:
            content = _content(config.get(f"{name}_token", special_map.get(f"{name}_token")))
            if content is not None:
                named[f"{name}_token"] = content
        pieces.mark_special(set(named.values()))  # whatever the vocabulary file says of them
        self = cls(
            pieces,
            named=named,
            add_bos=add_bos,
            add_eos=add_eos,
            chat_template=_chat_template(folder, config),
        )
        self._settle_ends()
        self.eos_ids = _eos_ids(folder, self)
        return self

    def _settle_ends(self) -> None:
        """Where the checkpoint speaks of one end only, the other is as tokenizer.json has it."""
        if (self.add_bos is None) == (self.add_eos is None):
            return
        bare, whole = (self.pieces.encode("a", add_special=add) for add in (False, True))
        if self.add_bos is None:
            self.add_bos = whole[:1] == [self.bos_id] != bare[:1]
        else:
            self.add_eos = whole[-1:] == [self._named_id("eos_token")] != bare[-1:]

    def id_of(self, piece: str) -> int | None:
        """The id of a piece of the vocabulary, added tokens included."""
        return self.pieces.id_of(piece)

    @property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def pad_id(self) -> int | None:
        return self._named_id("pad_token")

    def _named_id(self, name: str) -> int | None:
        content = self.named.get(name)
        return None if content is None else self.id_of(content)

    @property
    def thinking_ids(self) -> tuple[int, int] | None:
        """Ids of ``<think>`` and ``</think>`` where the vocabulary has them as single tokens."""
        start, end = self.id_of("<think>"), self.id_of("</think>")
        return None if start is None or end is None else (start, end)

    def __len__(self) -> int:
        return self.pieces.size()

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids. ``add_special`` puts begin and end tokens where the checkpoint wants them.
        What is half of a character (a lone surrogate) counts as U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self.add_bos is None:  # the tokenizer.json's own rule
            return self.pieces.encode(text, add_special=add_special)
        ids = self.pieces.encode(text, add_special=False)
        if not add_special:
            return ids
        start = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        eos = self._named_id("eos_token")
        return [*start, *ids, *([eos] if self.add_eos and eos is not None else [])]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 show as U+FFFD."""
        return self.pieces.decode(ids, skip_special)

    def stream(self, *, skip_special: bool = True) -> StreamingDetokenizer:
        """A detokenizer for one sequence of ids that arrive one by one."""
        skip = self.pieces.special if skip_special else ()
        return StreamingDetokenizer(self.pieces.piece, self.pieces.steps(), skip)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for ``messages``: by the chat template or, without one, plain lines."""
        check_messages(messages)
        if self.chat_template is None:
            return plain_transcript(messages, add_generation_prompt)
        return self.chat_template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **{**self.named, **variables},
        )

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of ``render_chat``; a template writes its begin token itself."""
        text = self.render_chat(messages, **options)
        return self.encode(text, add_special=self.chat_template is None)


def check_messages(messages: Sequence[Message]) -> None:
    """Raises MlxtxError unless every message is a dict with a role."""
    if not messages:
        raise MlxtxError("the list of messages is empty; give at least one user message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise MlxtxError(
                f"message {index} must be a dict with 'role' and 'content', not {message!r}"
            )
        if "content" not in message and "tool_calls" not in message:
            raise MlxtxError(f"message {index} has no 'content'")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} when there is none."""
    return read_json_object(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """Special tokens are written as "text" or as {"content": "text", ...}."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    older = _json(folder / "added_tokens.json")
    try:
        for content, token in older.items():
            added[int(token)] = {"content": content, "special": False}
        for token, entry in (config.get("added_tokens_decoder") or {}).items():
            added[int(token)] = entry if isinstance(entry, dict) else {"content": entry}
    except (TypeError, ValueError, AttributeError):
        added[-1] = {}
    if any(token < 0 or not isinstance(e.get("content"), str) for token, e in added.items()):
        raise MlxtxError(
            f"{folder}: added_tokens_decoder of tokenizer_config.json must give a text for each id,"
            " and added_tokens.json an id for each text"
        )
    return added


def _chat_template(folder: Path, config: dict[str, Any]) -> ChatTemplate | None:
    """From chat_template.jinja (and additional_chat_templates/), else the JSON files."""
    template = config.get("chat_template") or _json(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(template, str):
        template = {"default": template}
    elif isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    sources = template or {}
    if not isinstance(sources, dict) or not all(
        isinstance(text, str) for pair in sources.items() for text in pair
    ):
        raise MlxtxError(
            f"{folder}: the chat_template of tokenizer_config.json must be a text or a list of"
            f" texts with names, not {template!r:.60}"
        )
    if (folder / "chat_template.jinja").is_file():
        sources["default"] = read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        sources[path.stem] = read_text(path)
    return ChatTemplate(sources) if sources else None


def _eos_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    found = {tokenizer._named_id("eos_token")}
    config = _json(folder / "config.json")
    for name, source in (
        ("generation_config.json", _json(folder / "generation_config.json")),
        ("config.json", config),
        ("config.json", config.get("text_config")),
    ):
        value = source.get("eos_token_id") if isinstance(source, dict) else None
        ids = value if isinstance(value, list) else [value]
        if not all(token is None or type(token) is int for token in ids):
            raise MlxtxError(
                f"{folder / name}: eos_token_id must be a token's id or a list of them,"
                f" not {value!r:.60}"
            )
        found |= set(ids)
    return frozenset(token for token in found if token is not None and token >= 0)
