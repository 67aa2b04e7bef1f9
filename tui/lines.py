"""Blocks laid out as lines of a given width: wrapping, indents, tables. No widget in sight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mlxtx.tui.markdown import Block
from rich._wrap import divide_line
from rich.cells import cell_len
from textual.content import Content

_QUOTE_BAR = "▎ "
_NARROWEST_COLUMN = 6
_COLUMN_GAP = "  "


class Line(NamedTuple):
    """One row of cells. ``fill`` names the style that reaches to the right edge; ``wrapped`` says
    that the row goes on from the one before it, so that copied text gets no line end there.
    ``lead`` is how many characters of ``content`` are decoration and never copied."""

    content: Content
    fill: str = ""
    wrapped: bool = False
    lead: int = 0


BLANK = Line(Content(""))


def wrap(content: Content, width: int) -> list[Content]:
    """``content`` in pieces of at most ``width`` cells, cut at words where it can be."""
    lines: list[Content] = []
    for line in content.split(allow_blank=True):
        if cell_len(line.plain) <= width:
            lines.append(line)
            continue
        cuts = divide_line(line.plain, max(1, width))
        lines += [part.rstrip() for part in line.divide(cuts)] if cuts else [line]
    return lines


def wrap_plain(text: str, width: int, style: str = "") -> list[Line]:
    """Plain text, every line end kept, as lines in one style."""
    out: list[Line] = []
    for line in text.expandtabs(4).split("\n"):
        starts = [0]
        if len(line) > width or cell_len(line) > width:
            starts = [0, *divide_line(line, max(1, width))]
        for start, end in zip(starts, [*starts[1:], len(line)], strict=True):
            part = line[start:end]
            out.append(Line(styled(part.rstrip() or part[:0], style), "", start > 0))
    return out


def styled(text: str, style: str) -> Content:
    return Content.styled(text, style) if style and text else Content(text)


def layout(block: Block, width: int) -> list[Line]:
    """The lines of ``block``, its gap not included."""
    indent = min(block.indent, max(0, width - 8))
    quote = _QUOTE_BAR * min(block.quote, max(0, (width - indent - 8) // 2))
    inner = max(1, width - indent - len(quote))
    if block.kind == "rule":
        lines = [Line(styled("─" * inner, ".md-rule"))]
    elif block.kind == "code":
        lines = _code(block.content, block.language, inner)
    elif block.kind == "table":
        lines = _table(block.rows, inner)
    else:
        style = ".md-quote" if quote else ""
        parts = wrap(block.content.stylize_before(style) if style else block.content, inner)
        lines = [Line(part, "", at > 0) for at, part in enumerate(parts)]
    return list(_prefixed(lines, quote, indent, block.marker))


def _prefixed(lines: Iterable[Line], quote: str, indent: int, marker: str) -> Iterable[Line]:
    bars = styled(quote, ".md-quote-bar")
    for at, line in enumerate(lines):
        if not quote and not indent:
            yield line
            continue
        first = at == 0 and marker
        text = marker.rjust(indent)[-indent:] if first and indent else " " * indent
        lead = Content.assemble(bars, (text, ".md-marker"))
        # A list's marker is worth copying; indentation and bars are not.
        copied = 0 if first else len(lead.plain)
        yield line._replace(content=lead + line.content, lead=copied + line.lead)


def _code(content: Content, language: str, width: int) -> list[Line]:
    inner = max(1, width - 2)
    lines = []
    if language:
        lines.append(Line(styled(f" {language}", ".code-label"), ".code", lead=len(language) + 1))
    for source_line in content.split(allow_blank=True):
        length = len(source_line.plain)
        cuts = list(range(inner, length, inner)) if cell_len(source_line.plain) > inner else []
        for at, part in enumerate(source_line.divide(cuts) if cuts else [source_line]):
            lines.append(Line(Content(" ") + part, ".code", at > 0, lead=1))
    return [line._replace(content=line.content.stylize_before(".code")) for line in lines]


def code_tail(text: str, width: int) -> list[Line]:
    """An open fence while it grows: the code block it will be, without colours yet."""
    first, _, source = text.partition("\n")
    return _code(Content(source.expandtabs(4)), first.strip().strip("`~").strip(), width)


def _table(rows: tuple[tuple[Content, ...], ...], width: int) -> list[Line]:
    columns = max(map(len, rows), default=0)
    if not columns:
        return []
    cells = [[row[i] if i < len(row) else Content("") for i in range(columns)] for row in rows]
    widths = [max(cell_len(row[i].plain) for row in cells) for i in range(columns)]
    space = width - len(_COLUMN_GAP) * (columns - 1)
    # The widest column gives way until all fit, or until none can be narrower.
    while sum(widths) > space and max(widths) > _NARROWEST_COLUMN:
        widths[widths.index(max(widths))] -= 1
    lines: list[Line] = []
    for number, row in enumerate(cells):
        parts = [wrap(cell, size) for cell, size in zip(row, widths, strict=True)]
        for at in range(max(map(len, parts))):
            pieces = []
            for part, size in zip(parts, widths, strict=True):
                piece = part[at] if at < len(part) else Content("")
                pieces.append(piece.pad_right(max(0, size - cell_len(piece.plain))))
            line = Content(_COLUMN_GAP).join(pieces).truncate(width)
            lines.append(Line(line.stylize_before(".md-strong") if number == 0 else line))
        if number == 0:
            rule = min(width, sum(widths) + len(_COLUMN_GAP) * (columns - 1))
            lines.append(Line(styled("─" * rule, ".md-rule")))
    return lines
