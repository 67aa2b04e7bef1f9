"""Keys and commands, from the one table of actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from mlxtx.tui.actions import ACTIONS, AREAS, keys_of
from mlxtx.tui.widgets.bars import Hints, TitleBar
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Static

if TYPE_CHECKING:
    from mlxtx.tui.app import MlxtxApp

_COLUMN = 32
# What the input itself does; it is no action of the table.
_WRITING = (
    ("enter", "Send; during a reply, wait in line"),
    ("ctrl+j shift+enter", "New line"),
    ("up down", "In an empty input: earlier messages"),
    ("tab", "Complete a /command or an @path"),
    ("mouse", "Select text; ctrl+g copies it"),
)


class HelpScreen(Screen[None]):
    app: MlxtxApp
    AUTO_FOCUS = "VerticalScroll"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "app.pop_screen")]

    def compose(self) -> ComposeResult:
        yield TitleBar("Keys and commands")
        with VerticalScroll(can_focus=True):
            yield Static(help_text(self.app.settings.keys), classes="help")
        yield Hints(extra=(("esc", "back"), ("up down", "scroll")))


def help_text(chosen: Mapping[str, str]) -> Content:
    parts: list[Content] = []
    for area, title in AREAS.items():
        parts.append(Content.assemble(("\n" if parts else "", ""), (title, "bold $text-primary")))
        if area == "chat":
            parts += [_row(keys, "", words) for keys, words in _WRITING]
        for a in ACTIONS:
            if a.area == area:
                slash = f"/{a.slash} {a.usage}".rstrip() if a.slash else ""
                parts.append(_row(keys_of(a, chosen).replace(",", " "), slash, a.title))
    return Content("\n").join(parts)


def _row(keys: str, slash: str, words: str) -> Content:
    keys = keys.replace("escape", "esc").replace("slash", "/")
    gap = " " * max(2, _COLUMN - len(keys) - len(slash) - (2 if keys and slash else 0))
    between = "  " if keys and slash else ""
    return Content.assemble(
        "  ", (keys, "$text-accent"), between, (slash, "$text-primary"), gap, words
    )
