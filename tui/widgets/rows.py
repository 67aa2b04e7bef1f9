"""A list with columns and a cursor, drawn line by line: thousands of rows cost nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rich.segment import Segment
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

if TYPE_CHECKING:
    from textual import events

_GAP = 2
_NARROWEST = 12


@dataclass(frozen=True)
class Column:
    """``width`` 0 takes what is left; ``drop`` says how early it goes in a narrow terminal."""

    title: str
    width: int = 0
    right: bool = False
    drop: int = 0


@dataclass(frozen=True)
class Row:
    """``key`` is whatever the owner wants back; one cell a column."""

    key: Any
    cells: tuple[Content, ...]


class Rows(ScrollView, can_focus=True):
    """Posts ``Highlighted`` when the cursor moves. The owner binds Enter itself."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"title", "cursor", "empty"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home,g", "move(-1000000)", show=False),
        Binding("end,G", "move(1000000)", show=False),
    ]

    class Highlighted(Message):
        def __init__(self, row: Row | None) -> None:
            self.row = row
            super().__init__()

    class Chosen(Message):
        """A row was clicked twice."""

        def __init__(self, row: Row) -> None:
            self.row = row
            super().__init__()

    def __init__(self, *columns: Column) -> None:
        super().__init__()
        self.columns = columns
        self.rows: list[Row] = []
        self.cursor = 0
        self.empty = ""

    @property
    def chosen(self) -> Row | None:
        return self.rows[self.cursor] if self.cursor < len(self.rows) else None

    def show(self, rows: list[Row], empty: str = "") -> None:
        """Show ``rows``, the cursor on the same key as before where it is still there; ``empty``
        is said when there are none."""
        key = self.chosen.key if self.chosen else None
        self.rows, self.empty = rows, empty
        keys = [row.key for row in rows]
        at = keys.index(key) if key in keys else min(self.cursor, max(0, len(rows) - 1))
        self.virtual_size = Size(self.size.width, len(rows) + 1)
        self._go(at)

    def change(self, row: Row) -> None:
        """Replace the row that has the same key."""
        for at, old in enumerate(self.rows):
            if old.key == row.key and old != row:
                self.rows[at] = row
                self.refresh()

    def _go(self, at: int) -> None:
        self.cursor = at
        top = round(self.scroll_y)
        room = max(1, self.size.height - 1)
        if at < top:
            self.scroll_to(y=at, animate=False, force=True)
        elif at >= top + room:
            self.scroll_to(y=at - room + 1, animate=False, force=True)
        self.refresh()
        self.post_message(self.Highlighted(self.chosen))

    def action_move(self, step: int) -> None:
        if self.rows:
            self._go(max(0, min(len(self.rows) - 1, self.cursor + step)))

    def action_page(self, step: int) -> None:
        self.action_move(step * max(1, self.size.height - 2))

    def on_click(self, event: events.Click) -> None:
        at = round(self.scroll_y) + event.y - 1
        if event.y and 0 <= at < len(self.rows):
            self._go(at)
            if event.chain == 2:
                self.post_message(self.Chosen(self.rows[at]))

    def on_resize(self) -> None:
        self.virtual_size = Size(self.size.width, len(self.rows) + 1)

    def on_focus(self) -> None:
        self.refresh()

    def on_blur(self) -> None:
        self.refresh()

    # Drawing

    def _widths(self) -> list[int]:
        """Cells of each column; 0 for those that a narrow terminal has no room for."""
        widths = [column.width for column in self.columns]
        flexible = [at for at, column in enumerate(self.columns) if not column.width]
        for at in sorted(range(len(widths)), key=lambda at: -self.columns[at].drop):
            used = sum(width + _GAP for width in widths if width)
            if self.size.width - used >= _NARROWEST * len(flexible) or not self.columns[at].drop:
                break
            widths[at] = 0
        used = sum(width + _GAP for width in widths if width)
        for at in flexible:
            widths[at] = max(1, (self.size.width - used - _GAP) // len(flexible))
        return widths

    def render_line(self, y: int) -> Strip:
        base = self.visual_style
        width = self.size.width
        if y == 0:
            cells = tuple(Content(column.title) for column in self.columns)
            style = self.get_visual_style("title")
            return self._strip(cells, style if self.rows else base, width)
        at = round(self.scroll_y) + y - 1
        if not self.rows and y == 2:
            line = Content(self.empty).truncate(width, ellipsis=True)
            style = self.get_visual_style("empty")
            strip = Strip([Segment(line.plain, style.rich_style)])
            return strip.adjust_cell_length(width, base.rich_style)
        if at >= len(self.rows):
            return Strip.blank(width, base.rich_style)
        style = self.get_visual_style("cursor") if at == self.cursor and self.has_focus else base
        return self._strip(self.rows[at].cells, style, width)

    def _strip(self, cells: tuple[Content, ...], style: Any, width: int) -> Strip:
        segments: list[Segment] = []
        for column, cell, size in zip(self.columns, cells, self._widths(), strict=False):
            if not size:
                continue
            text = cell.truncate(size, ellipsis=True)
            space = size - text.cell_length
            text = text.pad_left(space) if column.right else text.pad_right(space)
            for part, part_style in text.pad_right(_GAP).render(style, ""):
                segments.append(Segment(part, (style + part_style).rich_style))
        return Strip(segments).adjust_cell_length(width, style.rich_style)
