"""All conversations: search in every message, open, rename, pin, delete, export, import."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mlxtx.tui.actions import bindings
from mlxtx.tui.clean import clean, one_line, path_of
from mlxtx.tui.conversation import Conversation
from mlxtx.tui.screens.dialogs import Ask
from mlxtx.tui.store import Chat, Found
from mlxtx.tui.widgets.bars import Hints, TitleBar
from mlxtx.tui.widgets.rows import Column, Row, Rows
from textual import events
from textual.app import ComposeResult
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Input

if TYPE_CHECKING:
    from mlxtx.tui.app import MlxtxApp

_SEARCH_DELAY = 0.15


class ChatsScreen(Screen[None]):
    app: MlxtxApp
    BINDINGS = bindings("chats")
    AUTO_FOCUS = "Rows"

    def __init__(self, words: str = "") -> None:
        super().__init__()
        self._words = words

    def compose(self) -> ComposeResult:
        self.search = Input(self._words, placeholder="Search all messages", classes="search")
        self.rows = Rows(Column("", 1), Column("Conversation"), Column(""), Column("Changed", 12))
        yield TitleBar("Conversations")
        yield self.search
        yield self.rows
        yield Hints("chats")

    def on_mount(self) -> None:
        self._fill()

    def _fill(self) -> None:
        query = self.search.value
        found = self.app.store.search(query)
        empty = "Nothing found." if query.strip() else "No conversations yet. esc goes back."
        self.rows.show([_row(hit) for hit in found], empty)

    def on_input_changed(self) -> None:
        # A search over years of messages waits for a pause in the typing.
        self.set_timer(_SEARCH_DELAY, self._fill)

    def on_input_submitted(self) -> None:
        self.rows.focus()

    def on_key(self, event: events.Key) -> None:
        if event.key == "down" and self.search.has_focus:
            self.rows.focus()

    def on_rows_chosen(self, event: Rows.Chosen) -> None:
        self.action_open()

    @property
    def _chat(self) -> Chat | None:
        row = self.rows.chosen
        return self.app.store.chat(row.key[0]) if row else None

    def action_open(self) -> None:
        if chat := self._chat:
            self.app.open_chat(chat.id)

    def action_search(self) -> None:
        self.search.focus()

    def action_back(self) -> None:
        if self.search.has_focus:
            self.rows.focus()
        else:
            self.dismiss()

    def action_rename(self) -> None:
        chat = self._chat
        if chat is None:
            return

        def done(title: str | None) -> None:
            if title:
                self.app.rename_chat(chat.id, one_line(title, 120))
                self._fill()

        self.app.push_screen(Ask("Rename the conversation", chat.title), done)

    def action_pin(self) -> None:
        if chat := self._chat:
            self.app.store.update_chat(chat.id, pinned=not chat.pinned)
            self._fill()

    def action_delete(self) -> None:
        if chat := self._chat:
            self.app.delete_chat(chat.id)
            self._fill()
            self.app.tell(f"Deleted {chat.title}. u brings it back.")

    def action_undo(self) -> None:
        if self.app.restore_chat():
            self._fill()
        else:
            self.app.tell("There is nothing to undo.", "warning")

    def action_export(self) -> None:
        chat = self._chat
        if chat is None:
            return

        def done(path: str | None) -> None:
            if path:
                text = Conversation(self.app.store, chat).to_json()
                self.app.save_text(path_of(path), text)

        self.app.push_screen(Ask("Export all branches as JSON to", f"chat-{chat.id}.json"), done)

    def action_import(self) -> None:
        def done(path: str | None) -> None:
            if path:
                self.app.import_file(path)
                self._fill()

        self.app.push_screen(Ask("Import a chat from a JSON file", placeholder="chat.json"), done)


def _row(hit: Found) -> Row:
    styles = ("$foreground 60%", "bold $text-primary")
    pieces = ((clean(text), styles[match]) for text, match in hit.pieces)
    snippet = Content.assemble(*pieces)
    pin = Content.styled("•", "$text-accent") if hit.chat.pinned else Content("")
    title = Content(one_line(hit.chat.title, 200) or "New chat")
    when = Content.styled(ago(time.time() - hit.chat.updated), "$foreground 60%")
    return Row((hit.chat.id, hit.message), (pin, title, snippet, when))


def ago(seconds: float) -> str:
    """How long ago, in one word and a number."""
    for unit, length in (("year", 31557600), ("month", 2629800), ("day", 86400), ("hour", 3600)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    minutes = int(seconds // 60)
    return f"{minutes} min ago" if minutes else "just now"
