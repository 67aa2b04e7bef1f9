"""From vocabulary pieces to text, one piece at a time.

Each step takes pieces in order and gives back what can no longer change; ``finish`` gives the
rest. Chained, steps reproduce the decoders of a ``tokenizer.json`` exactly, so the concatenation
of all that was given back equals the decoding of the whole sequence. Every character is touched
a constant number of times.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any, Protocol


class Step(Protocol):
    def push(self, piece: str) -> list[str]: ...

    def finish(self) -> list[str]: ...


class Map:
    """Changes each piece by itself; ``change(piece, first)`` knows whether it is the first."""

    def __init__(self, change: Callable[[str, bool], str]) -> None:
        self.change = change
        self.first = True

    def push(self, piece: str) -> list[str]:
        first, self.first = self.first, False
        return [self.change(piece, first)]

    def finish(self) -> list[str]:
        return []


def byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE vocabularies (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(rest)})
    return alphabet


class ByteLevel:
    """Byte-level BPE: stand-ins become bytes, and bytes text once a character is whole."""

    ALPHABET = byte_alphabet()

    def __init__(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def piece_bytes(self, piece: str) -> bytes:
        try:
            return bytes(self.ALPHABET[character] for character in piece)
        except KeyError:  # an added token with a character outside the alphabet is itself text
            return piece.encode("utf-8", "replace")

    def push(self, piece: str) -> list[str]:
        return [self.utf8.decode(self.piece_bytes(piece))]

    def finish(self) -> list[str]:
        return [self.utf8.decode(b"", True)]


_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ByteFallback:
    """Runs of ``<0xNN>`` pieces. A run is held until it ends, for one wrong byte spoils it all.

    The run is valid UTF-8 and becomes text, or each of its bytes becomes a replacement
    character: the rule of ``tokenizers``, which can only be applied to a whole run.
    """

    def __init__(self) -> None:
        self.run = bytearray()

    def push(self, piece: str) -> list[str]:
        byte = _BYTE_PIECE.fullmatch(piece)
        if byte:
            self.run.append(int(byte[1], 16))
            return []
        return [*self.finish(), piece]

    def finish(self) -> list[str]:
        run, self.run = bytes(self.run), bytearray()
        if not run:
            return []
        try:
            return [run.decode("utf-8")]
        except UnicodeDecodeError:
            return ["�"] * len(run)


class StripStart:
    """Drops up to ``count`` leading ``character`` of the whole text."""

    def __init__(self, character: str, count: int) -> None:
        self.character = character
        self.left = count

    def push(self, piece: str) -> list[str]:
        while self.left and piece:
            if not piece.startswith(self.character):
                self.left = 0
                break
            piece = piece[1:]
            self.left -= 1
        return [piece]

    def finish(self) -> list[str]:
        return []


class Hold:
    """Gives nothing until the end, then ``decode`` of all pieces: for decoders not known here."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self.decode = decode
        self.pieces: list[str] = []
        self.given = 0

    def push(self, piece: str) -> list[str]:
        self.pieces.append(piece)
        return []

    def finish(self) -> list[str]:
        text, given = self.decode(self.pieces), self.given
        self.given = len(text)
        return [text[given:]]


def run(steps: list[Step], piece: str | None) -> str:
    """Text that ``piece`` makes final; None ends the sequence and gives all that is left."""
    pieces = [] if piece is None else [piece]
    for step in steps:
        made = [text for given in pieces for text in step.push(given)]
        pieces = [*made, *step.finish()] if piece is None else made
    return "".join(pieces)


def steps_for(decoder: dict[str, Any] | None, whole: Callable[[list[str]], str]) -> list[Step]:
    """Steps for the ``decoder`` entry of a ``tokenizer.json``; ``whole`` decodes all pieces."""
    if decoder is None:  # no decoder: words joined by spaces
        return [Map(lambda piece, first: piece if first else " " + piece)]
    entries = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    steps: list[Step] = []
    fused = False
    for entry in entries:
        kind = entry["type"]
        if kind == "Fuse":
            fused = True
            continue
        step = _step_for(entry, fused)
        if step is None:
            return [Hold(whole)]
        steps.append(step)
        fused = fused or kind == "ByteLevel"
    return steps


def _step_for(entry: dict[str, Any], fused: bool) -> Step | None:
    kind = entry["type"]
    if kind == "ByteLevel" and not fused:
        return ByteLevel()
    if kind == "ByteFallback" and not fused:
        return ByteFallback()
    if kind == "Replace" and "String" in entry["pattern"]:
        old, new = entry["pattern"]["String"], entry["content"]
        if not fused or len(old) == 1:
            return Map(lambda piece, first: piece.replace(old, new))
    if kind == "Metaspace" and not fused:
        mark = entry["replacement"]
        prepended = entry.get("prepend_scheme", "always") != "never"
        return Map(lambda piece, first: piece.replace(mark, "" if first and prepended else " "))
    if kind == "Strip" and not entry["stop"] and fused:
        return StripStart(entry["content"], entry["start"])
    return None
