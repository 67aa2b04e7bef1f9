"""Where a message is written: grows with the text, recalls earlier ones, completes / and @."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mlxtx.tui import attach
from mlxtx.tui.actions import slash_commands
from mlxtx.tui.clean import clean, size
from textual import events
from textual.content import Content
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import TextArea

# A longer paste becomes an attachment with a short name: it would bury the input.
_LONGEST_PASTE = 8_000
_LONGEST_PASTE_LINES = 60
_PASTE_MARK = re.compile(r"\[pasted text (\d+): [^\]]*\]")
_WORD = re.compile(r"(?:^|\s)@(\S*)$")
_SHOWN_COMPLETIONS = 8


def expanded(
    text: str, pastes: list[dict[str, Any]], write: Callable[[str], str] = lambda pasted: pasted
) -> str:
    """``text`` with its long ``pastes``, as ``write`` writes each, in place of their marks."""
    pasted = {part["name"]: part["text"] for part in pastes}

    def whole(match: re.Match[str]) -> str:
        name = f"pasted text {match[1]}"
        return write(pasted[name]) if name in pasted else match[0]

    return _PASTE_MARK.sub(whole, text)


class Completions(Widget):
    """The list above the input; the input keeps the focus and moves ``at``."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, str]] = []
        self.at = 0
        self.display = False

    def show(self, rows: list[tuple[str, str]]) -> None:
        """``rows`` are (what is filled in, what it does)."""
        if rows != self.rows:
            self.rows, self.at = rows, 0
            self.display = bool(rows)
            self.refresh(layout=True)

    def move(self, step: int) -> None:
        self.at = (self.at + step) % len(self.rows)
        self.refresh()

    def render(self) -> Content:
        top = max(0, min(self.at - _SHOWN_COMPLETIONS // 2, len(self.rows) - _SHOWN_COMPLETIONS))
        rows = self.rows[top : top + _SHOWN_COMPLETIONS]
        column = max((len(name) for name, _ in rows), default=0) + 3
        width = self.content_size.width
        lines = []
        for number, (name, words) in enumerate(rows, top):
            line = Content.assemble(
                (name.ljust(column), "$text-primary"), (words, "$foreground 60%")
            )
            line = line.truncate(width, ellipsis=True, pad=True)
            lines.append(line.stylize("on $surface-lighten-2") if number == self.at else line)
        return Content("\n").join(lines)

    def get_content_height(self, container: Any, viewport: Any, width: int) -> int:
        return min(_SHOWN_COMPLETIONS, len(self.rows))


class Composer(TextArea):
    """Enter sends; Ctrl+J and Shift+Enter break the line; Up in an empty input recalls."""

    class Submitted(Message):
        """``text`` as typed, with ``pastes`` (attachments) for long pasted texts."""

        def __init__(self, text: str, pastes: list[dict[str, Any]]) -> None:
            self.text, self.pastes = text, pastes
            super().__init__()

    def __init__(self, completions: Completions) -> None:
        super().__init__(
            placeholder="Write a message…  / for commands, @ for files",
            highlight_cursor_line=False,
            compact=True,
        )
        self.completions = completions
        self.sent: list[tuple[str, list[dict[str, Any]]]] = []
        self._recalled: int | None = None
        self._draft = ""
        self._pastes: dict[int, str] = {}
        self._commands = slash_commands()

    def render_line(self, y: int) -> Strip:
        # A window of a few columns leaves none for the input, and Textual can't wrap into that.
        return super().render_line(y) if self.content_size.width > 0 else Strip.blank(0)

    # Sending

    def submit(self) -> None:
        text = self.text.strip()
        if not text:
            return
        pastes = self._pasted(text)
        if not self.sent or self.sent[-1] != (text, pastes):
            self.sent.append((text, pastes))
        self._pastes.clear()
        self.clear_text()
        self.post_message(self.Submitted(text, pastes))

    def _pasted(self, text: str) -> list[dict[str, Any]]:
        """The long pastes whose marks are in ``text``, as attachments."""
        numbers = [int(n) for n in _PASTE_MARK.findall(text) if int(n) in self._pastes]
        pasted = {f"pasted text {number}": self._pastes[number] for number in numbers}
        return [{"name": n, "text": t, "bytes": len(t.encode())} for n, t in pasted.items()]

    def clear_text(self) -> None:
        self._recalled = None
        self.completions.show([])
        self.load_text("")

    def fill(self, text: str) -> None:
        """Put ``text`` in the input, cursor at its end."""
        self.load_text(text)
        self.move_cursor(self.document.end)

    def give_back(self, *sent: tuple[str, list[dict[str, Any]]]) -> None:
        """Put messages that were not sent after all in front of what is being written."""
        texts = [self._with_pastes(*message) for message in sent]
        self.fill("\n\n".join([*texts, *([self.text] if self.text.strip() else [])]))

    def rewrite(self, text: str, attachments: list[dict[str, Any]]) -> None:
        """Put a message in the input; what stood there comes back with Up."""
        if self.text.strip():
            self.sent.append((self.text, self._pasted(self.text)))
        self._recalled = None
        self.fill(self._with_pastes(text, attachments))

    def _with_pastes(self, text: str, attachments: list[dict[str, Any]]) -> str:
        """``text``, whose marks stand for its long pastes again."""
        return expanded(text, attachments, self._mark)

    def _mark(self, text: str) -> str:
        """What stands for a long paste in the input."""
        number = len(self._pastes) + 1
        self._pastes[number] = text
        lines = text.count("\n") + 1
        return f"[pasted text {number}: {lines:,} lines, {size(len(text.encode()))}]"

    # Keys

    async def _on_key(self, event: events.Key) -> None:
        if self._handle_key(event.key):
            event.stop()
            event.prevent_default()
        else:
            await super()._on_key(event)

    def _handle_key(self, key: str) -> bool:
        popup = self.completions
        # Keys that came in one go: what is offered may still be for the first of them.
        if key in ("tab", "enter") and popup.display and (rows := self._rows()) != popup.rows:
            popup.show(rows)
        if popup.display:
            if key in ("up", "down"):
                popup.move(1 if key == "down" else -1)
                return True
            if key == "tab" or (key == "enter" and self._completes_to() != self._word()):
                self._complete()
                return True
            if key == "escape":
                popup.show([])
                return True
        if key == "enter":
            self.submit()
        elif key in ("ctrl+j", "shift+enter"):
            self._replace_via_keyboard("\n", *self.selection)
        elif key == "up" and self._can_recall(-1):
            self._recall(-1)
        elif key == "down" and self._can_recall(1):
            self._recall(1)
        else:
            return False
        return True

    def _can_recall(self, step: int) -> bool:
        if self._recalled is None:
            return step < 0 and bool(self.sent) and not self.text
        row = self.cursor_location[0]
        return row == 0 if step < 0 else row == self.document.line_count - 1

    def _recall(self, step: int) -> None:
        at = len(self.sent) if self._recalled is None else self._recalled
        at += step
        if at >= len(self.sent):
            self._recalled = None
            self.fill(self._draft)
        elif at >= 0:
            if self._recalled is None:
                self._draft = self.text
            self.fill(self._with_pastes(*self.sent[at]))
            self._recalled = at

    # Pasting

    async def _on_paste(self, event: events.Paste) -> None:
        # Textual calls the handlers of base classes too; the paste is inserted once, here.
        event.stop()
        event.prevent_default()
        text = clean(event.text)
        if len(text) > _LONGEST_PASTE or text.count("\n") > _LONGEST_PASTE_LINES:
            text = f"{self._mark(text)} "
        if result := self._replace_via_keyboard(text, *self.selection):
            self.move_cursor(result.end_location)

    # Completing

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        self.completions.show(self._rows() if self.has_focus and self._recalled is None else [])

    def _rows(self) -> list[tuple[str, str]]:
        text = self.text
        if text.startswith("/") and "\n" not in text and " " not in text:
            return [
                (f"/{name} {action.usage}".rstrip(), action.title)
                for name, action in self._commands.items()
                if name.startswith(text[1:].lower())
            ]
        row, column = self.cursor_location
        if match := _WORD.search(self.document[row][:column]):
            return [(f"@{path}", "") for path in attach.completions(match[1])]
        return []

    def _completes_to(self) -> str:
        name = self.completions.rows[self.completions.at][0]
        return name.split(" ")[0] if name.startswith("/") else name

    def _word(self) -> str:
        """The /command or @path that is being typed."""
        row, column = self.cursor_location
        match = _WORD.search(self.document[row][:column])
        return f"@{match[1]}" if match else self.text.strip()

    def _complete(self) -> None:
        chosen = self._completes_to()
        if chosen.startswith("/"):
            usage = self._commands[chosen[1:]].usage
            self.fill(chosen + (" " if usage else ""))
            self.completions.show([])
            return
        row, column = self.cursor_location
        match = _WORD.search(self.document[row][:column])
        assert match is not None
        start = (row, match.start(1) - 1)
        if " " in chosen and not chosen.endswith("/"):
            chosen = f'@"{chosen[1:]}"'
        ending = "" if chosen.endswith("/") else " "
        self._replace_via_keyboard(chosen + ending, start, (row, column))
