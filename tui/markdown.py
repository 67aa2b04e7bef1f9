"""Markdown as styled blocks, one at a time, so that a growing reply is never parsed again.

``Splitter`` cuts a stream of text into pieces that later text can't change: a paragraph at its
blank line, a fence at its end, each list item when the next begins. ``parse`` turns one piece into
blocks. A reply is shown by the same two steps while it grows and when it is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from textual.content import Content, Span

if TYPE_CHECKING:
    from markdown_it.token import Token

_FENCE = re.compile(r"(\s*)(`{3,}|~{3,})\s*([^`\s]*)[^`]*$")
_ITEM = re.compile(r"(\s*)([-*+]|\d{1,9}[.)])\s+")
_HEADING = re.compile(r" {0,3}#{1,6}(\s|$)")
# Longer pieces are shown as plain text: a megabyte on one line is no prose.
_LONGEST_PIECE = 50_000


@dataclass(frozen=True)
class Piece:
    """Lines that belong together. ``gap``: a blank line stands before them."""

    text: str
    indent: int = 0
    gap: bool = False


EMPTY = Content("")


@dataclass(frozen=True)
class Block:
    """One thing to lay out: ``kind`` is "text", "code", "table" or "rule".

    ``content`` has spans with the names of the transcript's component classes; ``marker`` (a
    bullet, a number) stands in the ``indent`` cells before its first line; ``quote`` is how many
    bars stand before each line. Code keeps its source in ``source``, a table its cells in ``rows``.
    """

    kind: str
    content: Content = EMPTY
    indent: int = 0
    marker: str = ""
    quote: int = 0
    gap: bool = False
    source: str = ""
    language: str = ""
    rows: tuple[tuple[Content, ...], ...] = ()


class Splitter:
    """Cuts text that comes in any portions into pieces; ``tail`` is the piece still open."""

    def __init__(self) -> None:
        self.tail = ""
        self._lines: list[str] = []
        self._rest = ""
        self._fence = ""
        self._gap = False
        self._in_list = False

    @property
    def tail_is_code(self) -> bool:
        return bool(self._fence)

    @property
    def tail_gap(self) -> bool:
        return self._gap

    def feed(self, text: str) -> list[Piece]:
        """The pieces that ``text`` completes."""
        pieces: list[Piece] = []
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line, pieces)
        self.tail = "\n".join([*self._lines, self._rest] if self._rest else self._lines)
        return pieces

    def finish(self) -> list[Piece]:
        """The last piece, when no more text comes."""
        pieces: list[Piece] = []
        if self._rest:
            self._line(self._rest, pieces)
            self._rest = ""
        self._close(pieces)
        self.tail = ""
        return pieces

    def _line(self, line: str, pieces: list[Piece]) -> None:
        if self._fence:
            self._lines.append(line)
            stripped = line.strip()
            if stripped.startswith(self._fence) and not stripped.strip(self._fence[0]):
                self._close(pieces)
        elif not line.strip():
            self._close(pieces)
            self._gap = True
        elif fence := _FENCE.match(line):
            self._close(pieces)
            self._fence = fence[2]
            self._lines.append(line)
        elif _HEADING.match(line):
            self._close(pieces)
            self._in_list = False
            self._lines.append(line)
            self._close(pieces)
        else:
            if _ITEM.match(line):
                self._close(pieces)
                self._in_list = True
            elif not self._lines and not line[0].isspace():
                self._in_list = False
            self._lines.append(line)

    def _close(self, pieces: list[Piece]) -> None:
        if self._lines:
            first = self._lines[0]
            indent = len(first) - len(first.lstrip()) if self._in_list or self._fence else 0
            lines = [_dedent(line, indent) for line in self._lines]
            pieces.append(Piece("\n".join(lines), indent if self._in_list else 0, self._gap))
            self._gap = False
        self._lines = []
        self._fence = ""


def _dedent(line: str, indent: int) -> str:
    return line[min(indent, len(line) - len(line.lstrip())) :]


def split(text: str) -> list[Piece]:
    """All pieces of a text that is complete."""
    splitter = Splitter()
    return splitter.feed(text) + splitter.finish()


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def parse(piece: Piece) -> list[Block]:
    """The blocks of one piece; most pieces have one."""
    if len(piece.text) > _LONGEST_PIECE:
        return [Block("text", Content(piece.text), piece.indent, gap=piece.gap)]
    blocks = _Walk(piece.indent).blocks(_parser().parse(piece.text))
    if blocks and piece.gap:
        blocks[0] = replace(blocks[0], gap=True)
    return blocks


class _Walk:
    """Goes through markdown-it's flat tokens and keeps where it is: lists, quotes, a table."""

    def __init__(self, indent: int) -> None:
        self._indents = [indent]
        self._numbers: list[int | None] = []
        self._marker = ""
        self._quote = 0
        self._heading = ""
        self._in_table = False
        self._row: list[Content] = []
        self._rows: list[tuple[Content, ...]] = []

    def blocks(self, tokens: list[Token]) -> list[Block]:
        out: list[Block] = []
        for token in tokens:
            handle = getattr(self, "_" + token.type, None)
            if handle is not None and (block := handle(token)) is not None:
                out.append(block)
        return out

    def _block(self, kind: str, content: Content, **values: Any) -> Block:
        marker, self._marker = self._marker, ""
        return Block(kind, content, self._indents[-1], marker, self._quote, **values)

    def _inline(self, token: Token) -> Block | None:
        content = inline(token.children or [])
        if self._heading:
            content = content.stylize_before("." + self._heading)
        if self._in_table:
            self._row.append(content)
            return None
        return self._block("text", content)

    def _heading_open(self, token: Token) -> None:
        self._heading = "md-title" if token.tag in ("h1", "h2") else "md-heading"

    def _heading_close(self, token: Token) -> None:
        self._heading = ""

    def _fence(self, token: Token) -> Block:
        language = token.info.split()[0] if token.info.strip() else ""
        source = token.content.removesuffix("\n")
        return self._block("code", highlight(source, language), source=source, language=language)

    _code_block = _fence

    def _hr(self, token: Token) -> Block:
        return self._block("rule", EMPTY)

    def _blockquote_open(self, token: Token) -> None:
        self._quote += 1

    def _blockquote_close(self, token: Token) -> None:
        self._quote -= 1

    def _bullet_list_open(self, token: Token) -> None:
        self._numbers.append(None)

    def _ordered_list_open(self, token: Token) -> None:
        start = token.attrGet("start")
        self._numbers.append(1 if start is None else int(start))

    def _bullet_list_close(self, token: Token) -> None:
        self._numbers.pop()

    _ordered_list_close = _bullet_list_close

    def _list_item_open(self, token: Token) -> None:
        number = self._numbers[-1]
        self._marker = "• " if number is None else f"{number}. "
        if number is not None:
            self._numbers[-1] = number + 1
        self._indents.append(self._indents[-1] + len(self._marker))

    def _list_item_close(self, token: Token) -> Block | None:
        # An item that is still empty shows its marker all the same.
        block = self._block("text", EMPTY) if self._marker else None
        self._indents.pop()
        return block

    def _table_open(self, token: Token) -> None:
        self._in_table = True

    def _tr_close(self, token: Token) -> None:
        self._rows.append(tuple(self._row))
        self._row = []

    def _table_close(self, token: Token) -> Block:
        rows, self._rows, self._in_table = tuple(self._rows), [], False
        return self._block("table", EMPTY, rows=rows)


_STYLES = {"strong": ".md-strong", "em": ".md-em", "s": ".md-strike", "link": ".md-link"}


def inline(tokens: list[Token]) -> Content:
    """Inline tokens as text with spans."""
    parts: list[str] = []
    spans: list[Span] = []
    open_at: list[tuple[int, str]] = []
    length = 0

    def add(text: str, style: str = "") -> None:
        nonlocal length
        parts.append(text)
        if style:
            spans.append(Span(length, length + len(text), style))
        length += len(text)

    for token in tokens:
        name, _, end = token.type.rpartition("_")
        if end == "open" and name in _STYLES:
            open_at.append((length, str(token.attrGet("href") or "")))
        elif end == "close" and name in _STYLES:
            start, address = open_at.pop()
            spans.append(Span(start, length, _STYLES[name]))
            # A terminal can't hide an address behind words without hiding where it leads.
            if address and address not in "".join(parts):
                add(f" ({address})", ".md-address")
        elif token.type == "code_inline":
            add(token.content, ".md-code")
        elif token.type in ("softbreak", "hardbreak"):
            add("\n" if token.type == "hardbreak" else " ")
        elif token.type == "image":
            add(f"[{token.content or 'image'}]", ".md-address")
        else:
            add(token.content)
    return Content("".join(parts), spans)


# Few colours: what a reader looks for in code is where comments, strings and keywords are.
_CODE_STYLES = {
    "Comment": ".code-comment",
    "Keyword": ".code-keyword",
    "Operator.Word": ".code-keyword",
    "Literal.String": ".code-string",
    "Literal.Number": ".code-number",
    "Name.Function": ".code-name",
    "Name.Class": ".code-name",
    "Name.Decorator": ".code-name",
    "Name.Tag": ".code-keyword",
    "Generic.Deleted": ".code-number",
    "Generic.Inserted": ".code-string",
}


def highlight(source: str, language: str) -> Content:
    """Code with a span for each token that has a colour; unknown languages stay plain."""
    source = source.expandtabs(4)
    if not language or len(source) > _LONGEST_PIECE:
        return Content(source)
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return Content(source)
    spans = []
    at = 0
    for kind, text in lexer.get_tokens(source):
        if style := _code_style(kind):
            spans.append(Span(at, at + len(text), style))
        at += len(text)
    return Content(source, spans)


@cache
def _code_style(kind: Any) -> str:
    while kind is not None:
        if style := _CODE_STYLES.get(str(kind).removeprefix("Token.")):
            return style
        kind = kind.parent
    return ""
