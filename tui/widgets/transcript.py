"""The conversation as one scrolling widget that draws lines; messages are no widgets.

Mounting a widget for every paragraph of a long chat takes seconds; drawing the lines that are in
view does not. Only the last messages are laid out when a chat opens, earlier ones when the reader
gets there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from mlxtx.tui.actions import bindings
from mlxtx.tui.lines import BLANK, Line, styled
from mlxtx.tui.widgets.message import MessageView
from rich.segment import Segment
from textual.geometry import Offset, Region, Size
from textual.message import Message as TextualMessage
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.style import Style

if TYPE_CHECKING:
    from textual import events
    from textual.selection import Selection

# A line longer than this is tiring to read; a wide terminal gets wider margins instead.
WIDEST = 100
_MARGIN = 2
_WINDOW = 30
_CURSOR_BAR = "┃"


class Transcript(ScrollView, can_focus=True):
    """Shows ``views``; follows the end until the reader scrolls away from it."""

    BINDINGS = bindings("messages")
    # A click selects text; the keys of messages (d deletes) must not follow from it.
    FOCUS_ON_CLICK = False
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "user", "user-bar", "attachment", "note", "thinking", "switch", "cursor", "empty-title",
        "state-stopped", "state-failed", "state-lost", "earlier",
        "md-title", "md-heading", "md-strong", "md-em", "md-strike", "md-link", "md-address",
        "md-code", "md-quote", "md-quote-bar", "md-marker", "md-rule",
        "code", "code-label", "code-comment", "code-keyword", "code-string", "code-number",
        "code-name",
    }  # fmt: skip

    class Picked(TextualMessage):
        """The reader pressed Enter on, or clicked, ``view``."""

        def __init__(self, view: MessageView) -> None:
            self.view = view
            super().__init__()

    class Typed(TextualMessage):
        """A character that is no key of a message: it belongs to the input."""

        def __init__(self, character: str) -> None:
            self.character = character
            super().__init__()

    def __init__(self, empty: Callable[[int], list[Line]] | None = None) -> None:
        super().__init__()
        self.views: list[MessageView] = []
        self.following = True
        self.cursor: int | None = None
        self._empty = empty
        self._empty_lines: list[Line] = []
        self._first = 0
        self._tops: list[int] = [0]
        self._line_width = 0
        self._styles_of: Callable[[str | Style], Style] = lru_cache(1024)(self._find_style)

    # What is shown

    def show(self, views: list[MessageView]) -> None:
        """Show ``views`` from their end."""
        self.views = views
        self._first = max(0, len(views) - _WINDOW)
        self.cursor = None
        self.following = True
        self._mark_last()
        self._measure()

    def changed(self, view: MessageView) -> None:
        """``view`` has grown or changed: measure and draw what is different."""
        if view in self.views[self._first :]:
            self._measure(self.views.index(view))

    def redraw_empty(self) -> None:
        """What an empty chat says has changed."""
        if not self.views:
            self._measure()

    def view_of(self, number: int) -> MessageView | None:
        return next((view for view in self.views if view.message.id == number), None)

    @property
    def hidden(self) -> int:
        """How many earlier messages are not laid out."""
        return self._first

    def show_earlier(self) -> None:
        """Lay out some more of the earlier messages; what is in view stays where it is."""
        if not self._first:
            return
        height = self._tops[-1]
        self._first = max(0, self._first - _WINDOW)
        following = self.following
        self.following = False
        self._measure()
        self.scroll_to(y=self.scroll_y + self._tops[-1] - height, animate=False, force=True)
        self.following = following
        self.screen.clear_selection()

    def _mark_last(self) -> None:
        for view in self.views[-3:]:
            if view.last != (view is self.views[-1]):
                view.last = view is self.views[-1]

    def _measure(self, start: int | None = None) -> None:
        """Compute where views from number ``start`` on stand, and show the change."""
        width = self.size.width
        if not width:
            return
        self._line_width = min(WIDEST, max(1, width - 2 * _MARGIN))
        old_height = self._tops[-1]
        at = 0 if start is None else start - self._first
        tops = self._tops[: at + 1] if start is not None else [1 if self._first else 0]
        for view in self.views[self._first + at :]:
            tops.append(tops[-1] + view.height(self._line_width))
        self._tops = tops
        height = tops[-1] + 1
        self._empty_lines = []
        if self._empty is not None and not self.views:
            self._empty_lines = self._empty(self._line_width)
            height = self.size.height
        if self.virtual_size.height != height or self.virtual_size.width != width:
            self.virtual_size = Size(width, height)
        if self.following:
            self.scroll_to(y=self.max_scroll_y, animate=False, force=True)
        if start is None or tops[-1] < old_height:
            self.refresh()
        else:
            self._refresh_from(tops[at])

    def _refresh_from(self, row: int) -> None:
        top = max(0, row - self.scroll_offset.y)
        if top < self.size.height:
            self.refresh(Region(0, top, self.size.width, self.size.height - top))

    def on_resize(self, event: events.Resize) -> None:
        self._measure()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        self.following = new_value >= self.max_scroll_y
        if new_value < 2 and old_value > new_value and self._first:
            self.call_after_refresh(self.show_earlier)

    def notify_style_update(self) -> None:
        self._styles_of = lru_cache(1024)(self._find_style)
        for view in self.views:
            view.strips.clear()
        super().notify_style_update()

    # Drawing

    def _find_style(self, style: str | Style) -> Style:
        """What a component class adds; an opaque background is lost in Textual's partial styles."""
        if isinstance(style, Style):
            return style
        name = style.removeprefix(".")
        rules, whole = self.get_component_styles(name), self.get_visual_style(name)
        coloured = rules.has_rule("color") or rules.has_rule("auto_color")
        return Style(
            background=whole.background if rules.has_rule("background") else None,
            foreground=whole.foreground if coloured else None,
            bold=whole.bold or None,
            italic=whole.italic or None,
            strike=whole.strike or None,
        )

    def _at(self, row: int) -> tuple[MessageView | None, int]:
        """The view at absolute ``row`` and which of its lines that is."""
        number = bisect_right(self._tops, row) - 1
        if number < 0 or self._first + number >= len(self.views):
            return None, 0
        return self.views[self._first + number], row - self._tops[number]

    def _line_at(self, row: int) -> Line:
        view, at = self._at(row)
        if view is not None:
            return view.line(at)
        if row == 0 and self._first:
            return Line(styled(f"↑ {self._first:,} earlier messages", ".earlier"))
        at = row - max(0, (self.size.height - len(self._empty_lines)) // 2)
        return self._empty_lines[at] if 0 <= at < len(self._empty_lines) else BLANK

    @property
    def _margin(self) -> int:
        return max(0, (self.size.width - self._line_width) // 2)

    def render_line(self, y: int) -> Strip:
        row = self.scroll_offset.y + y
        view, at = self._at(row)
        chosen = view is not None and self.has_focus and self._cursor_view is view and at > 0
        selection = self.text_selection
        plain = selection is None and not chosen and view is not None and view.is_settled(at)
        if plain and view is not None and (strip := view.strips.get(at)) is not None:
            assert isinstance(strip, Strip)
            return strip.apply_offsets(0, row)
        line = self._line_at(row)
        if selection is not None and (span := selection.get_span(row)) is not None:
            line = self._with_selection(line, span)
        strip = self._strip(line, chosen)
        if plain and view is not None:
            view.strips[at] = strip
        return strip.apply_offsets(0, row)

    def _with_selection(self, line: Line, span: tuple[int, int]) -> Line:
        start, end = (max(0, x - self._margin) if x >= 0 else x for x in span)
        end = len(line.content.plain) if end < 0 else end
        style = self.screen.get_visual_style("screen--selection")
        return line._replace(content=line.content.stylize(style, max(start, line.lead), end))

    def _strip(self, line: Line, chosen: bool) -> Strip:
        base = self.visual_style
        width, margin = self.size.width, self._margin
        segments = [Segment(" " * margin, base.rich_style)]
        if chosen and margin:
            bar = base + self._styles_of(".cursor")
            segments = [
                Segment(" " * (margin - 1), base.rich_style),
                Segment(_CURSOR_BAR, bar.rich_style),
            ]
        fill = base + self._styles_of(line.fill) if line.fill else base
        # Code brings its own background, so that what stands before it stays without.
        under = fill if line.fill == ".user" else base
        for text, style in line.content.render(Style.null(), "", self._styles_of):
            segments.append(Segment(text, (under + style).rich_style))
        strip = Strip(segments)
        right = margin + self._line_width
        if line.fill:
            strip = strip.extend_cell_length(right, fill.rich_style)
        return strip.adjust_cell_length(width, base.rich_style)

    # Selecting and copying

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        start = selection.start or Offset(0, 0)
        end = selection.end or Offset(1_000_000, self._tops[-1])
        out: list[str] = []
        for row in range(start.y, min(end.y, self._tops[-1]) + 1):
            line = self._line_at(row)
            text = line.content.plain
            first = max(line.lead, start.x - self._margin if row == start.y else 0)
            last = max(0, end.x - self._margin) if row == end.y else len(text)
            part = text[first:last].rstrip()
            if line.wrapped and out:
                out[-1] += (" " if line.fill != ".code" else "") + part
            else:
                out.append(part)
        return "\n".join(out).strip("\n"), "\n"

    # The cursor over messages

    @property
    def _cursor_view(self) -> MessageView | None:
        if self.cursor is None or not 0 <= self.cursor < len(self.views):
            return None
        return self.views[self.cursor]

    @property
    def chosen(self) -> MessageView | None:
        """The message under the cursor while the transcript has the focus."""
        return self._cursor_view if self.has_focus else None

    def on_focus(self) -> None:
        if self._cursor_view is None and self.views:
            self.cursor = len(self.views) - 1
        self.refresh()

    def on_blur(self) -> None:
        self.refresh()

    def on_key(self, event: events.Key) -> None:
        bound = self.screen.active_bindings
        if event.is_printable and event.character and event.key not in bound:
            event.stop()
            self.post_message(self.Typed(event.character))

    def action_up(self) -> None:
        self._move(-1)

    def action_down(self) -> None:
        self._move(1)

    def action_first(self) -> None:
        while self._first:
            self.show_earlier()
        self._move(-len(self.views))

    def action_last(self) -> None:
        self._move(len(self.views))

    def action_pick(self) -> None:
        if (view := self._cursor_view) is not None:
            self.post_message(self.Picked(view))

    def _move(self, step: int) -> None:
        if not self.views:
            return
        at = len(self.views) - 1 if self.cursor is None else self.cursor + step
        self.cursor = max(0, min(len(self.views) - 1, at))
        if self.cursor < self._first:
            self.show_earlier()
        top, bottom = self._tops[self.cursor - self._first : self.cursor - self._first + 2]
        if top < self.scroll_offset.y or bottom - top >= self.size.height:
            self.scroll_to(y=top, animate=False)
        elif bottom > self.scroll_offset.y + self.size.height:
            self.scroll_to(y=bottom - self.size.height + 1, animate=False)
        self.refresh()

    def on_click(self, event: events.Click) -> None:
        if not self.screen.get_selected_text():
            view, _ = self._at(self.scroll_offset.y + event.y)
            if view is not None:
                self.cursor = self.views.index(view)
                self.refresh()
