"""The two kinds of vocabulary file, behind one small interface.

``Pieces`` is ``tokenizer.json`` (through ``tokenizers``) or ``tokenizer.model`` (through
``sentencepiece``). Special tokens at the ends of a text are the business of the ``Tokenizer``,
except those that ``tokenizer.json`` itself prescribes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlxtx.errors import MlxtxError
from mlxtx.text.pieces import ByteFallback, Map, Step, StripStart, run, steps_for


class Pieces(Protocol):
    special: set[int]

    def mark_special(self, contents: Iterable[str]) -> None:
        """What the vocabulary has of ``contents`` is no text when decoded from now on."""
        ...

    def encode(self, text: str, *, add_special: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...

    def piece(self, token: int) -> str | None: ...

    def id_of(self, piece: str) -> int | None: ...

    def size(self) -> int: ...

    def steps(self) -> list[Step]: ...


AddedToken = dict[str, Any]  # content and flags
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


class TokenizersPieces:
    """``tokenizer.json``, with the added tokens, and their flags, of ``tokenizer_config.json``."""

    def __init__(self, path: Path, added: dict[int, AddedToken]) -> None:
        import tokenizers

        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise MlxtxError(f"{path} is not a readable tokenizer.json: {error}") from error
        # Settings saved by a training script; a prompt is never cut or padded in silence.
        self.inner.no_truncation()
        self.inner.no_padding()
        self._add(added, path)
        self.decoder = self._decoder_entry()

    def _add(self, added: dict[int, AddedToken], path: Path) -> None:
        new = self._add_tokens([entry for _, entry in sorted(added.items())])
        for token, entry in added.items():
            given = self.inner.token_to_id(entry["content"])
            if entry["content"] in new and given != token:
                raise MlxtxError(
                    f"{path.parent}: {entry['content']!r} has the id {token} in"
                    f" tokenizer_config.json but becomes {given} in tokenizer.json; one of the two"
                    " files is not this model's"
                )

    def _add_tokens(self, entries: Iterable[AddedToken]) -> set[str]:
        """Adds what is not there and gives it; of what is there, the flags that ``entries`` name
        are changed."""
        from tokenizers import AddedToken as Token

        every = self.inner.get_added_tokens_decoder()
        held = {entry.content: entry for entry in every.values()}
        new = []
        for entry in entries:
            known = held.get(entry["content"])
            before = {name: getattr(known, name) for name in _FLAGS} if known else {}
            flags = before | {name: bool(entry[name]) for name in _FLAGS if name in entry}
            flags["special"] = before.get("special", False) or flags.get("special", False)
            if flags != before:
                new.append(Token(entry["content"], **flags))
        if new:
            self.inner.add_tokens(new)  # all together: each call looks at every token
            every = self.inner.get_added_tokens_decoder()
        self.special = {token for token, entry in every.items() if entry.special}
        return {token.content for token in new} - held.keys()

    def mark_special(self, contents: Iterable[str]) -> None:
        known = [content for content in contents if self.id_of(content) is not None]
        self._add_tokens({"content": content, "special": True} for content in known)

    def _decoder_entry(self) -> dict[str, Any] | None:
        decoder = self.inner.decoder
        # Pickling gives this part's JSON without writing out the whole vocabulary.
        return None if decoder is None else json.loads(decoder.__getstate__())

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        return self.inner.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=skip_special)

    def piece(self, token: int) -> str | None:
        return self.inner.id_to_token(token)

    def id_of(self, piece: str) -> int | None:
        return self.inner.token_to_id(piece)

    def size(self) -> int:
        return self.inner.get_vocab_size(with_added_tokens=True)

    def steps(self) -> list[Step]:
        decoder = self.inner.decoder
        return steps_for(self.decoder, lambda pieces: decoder.decode(pieces))


# Protobuf of ModelProto {normalizer_spec (3): {add_dummy_prefix (3): false}}. Messages that
# follow one another merge, so appended to a model it switches the leading space off.
_NO_LEADING_SPACE = b"\x1a\x02\x18\x00"
_MARK = "▁"


class SentencePieces:
    """``tokenizer.model``, with added tokens cut out of the text before it is split.

    The leading-space rule: a model trained with a dummy prefix writes a space before the text's
    first word. ``legacy`` writes one after every added token too, as the first Llama tokenizers
    did; today only the start of the text gets it.
    """

    def __init__(self, path: Path, added: dict[int, AddedToken], *, legacy: bool) -> None:
        import sentencepiece

        self.inner, self.bare = (sentencepiece.SentencePieceProcessor() for _ in range(2))
        try:
            data = path.read_bytes()
            self.inner.LoadFromSerializedProto(data)
            self.bare.LoadFromSerializedProto(data + _NO_LEADING_SPACE)
            every = list(range(self.inner.get_piece_size()))  # asked together, four times as fast
            self.names: list[str] = self.inner.id_to_piece(every)
        except OSError as error:
            raise MlxtxError(f"cannot read {path}: {error.strerror or error}") from error
        except (RuntimeError, UnicodeDecodeError) as error:
            raise MlxtxError(
                f"{path} is not a sentencepiece model; save the tokenizer as tokenizer.json"
                " (transformers' AutoTokenizer does) and put it beside the weights"
            ) from error
        self.legacy = legacy
        self.pieces = len(self.names)
        self.added = {token: entry["content"] for token, entry in added.items()}
        self.ids = {content: token for token, content in self.added.items()}
        kinds = zip(self.inner.is_control(every), self.inner.is_unknown(every), strict=True)
        self.control = {token for token, kind in enumerate(kinds) if any(kind)}
        self.special = {token for token, entry in added.items() if entry.get("special", True)}
        self.special |= self.control
        self.cut = self._pattern(added)
        self.left_stripping = {e["content"] for e in added.values() if e.get("lstrip")}
        probe = self.inner.normalize("a  b")
        self.leading_space = probe.startswith(_MARK)
        self.collapses_spaces = _MARK * 2 not in probe

    def _pattern(self, added: dict[int, AddedToken]) -> re.Pattern[str] | None:
        """Matches any added or control token; the longest first, with the space behind it that it
        swallows. (Space before it, looked for here, would take the square of its length.)"""
        entries: dict[str, AddedToken] = {self.names[token]: {} for token in self.control} | {
            entry["content"]: entry for entry in added.values() if entry["content"]
        }
        if not entries:
            return None
        alternatives = [
            f"({re.escape(content)})" + (r"\s*" if entries[content].get("rstrip") else "")
            for content in sorted(entries, key=len, reverse=True)
        ]
        return re.compile("|".join(alternatives))

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        ids: list[int] = []
        position = 0
        for match in self.cut.finditer(text) if self.cut else ():
            content = match[match.lastindex or 0]
            before = text[position : match.start()]
            before = before.rstrip() if content in self.left_stripping else before
            ids += self._encode_part(before, first=position == 0)
            ids.append(self.ids.get(content, self.inner.piece_to_id(content)))
            position = match.end()
        return ids + self._encode_part(text[position:], first=position == 0)

    def _encode_part(self, text: str, first: bool) -> list[int]:
        if not text:
            return []
        return (self.inner if first or self.legacy else self.bare).encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        steps = self.steps()
        skip = self.special if skip_special else ()
        pieces = [self.piece(token) for token in ids if token not in skip]
        return "".join(run(steps, piece) for piece in [*(p for p in pieces if p is not None), None])

    def piece(self, token: int) -> str | None:
        if token in self.added:
            return self.added[token]
        if not 0 <= token < self.pieces:
            return None
        return self.names[token]

    def mark_special(self, contents: Iterable[str]) -> None:
        ids = (self.id_of(content) for content in contents)
        self.special |= {token for token in ids if token is not None}

    def id_of(self, piece: str) -> int | None:
        if piece in self.ids:
            return self.ids[piece]
        token = self.inner.piece_to_id(piece)
        known = 0 <= token < self.pieces and self.names[token] == piece
        return token if known else None

    def size(self) -> int:
        return max(self.pieces, *(token + 1 for token in self.added), 0)

    def steps(self) -> list[Step]:
        steps: list[Step] = [Map(lambda piece, first: piece.replace(_MARK, " ")), ByteFallback()]
        if self.collapses_spaces:
            steps.append(StripStart(" ", -1))
        elif self.leading_space:
            steps.append(StripStart(" ", 1))
        return steps
