"""Every setting with its value and what it is for; Enter changes it, in the file too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from mlxtx.tui.clean import one_line
from mlxtx.tui.screens.dialogs import Ask
from mlxtx.tui.widgets.bars import Hints, TitleBar
from mlxtx.tui.widgets.rows import Column, Row, Rows
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Static

from mlxtx.settings import Sampling, Settings, known_settings, parse_value

if TYPE_CHECKING:
    from mlxtx.tui.app import MlxtxApp

_TABLES: tuple[tuple[str, type], ...] = (("", Settings), ("sampling", Sampling))


class SettingsScreen(Screen[None]):
    app: MlxtxApp
    AUTO_FOCUS = "Rows"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "change"),
        Binding("delete,backspace", "reset"),
        Binding("escape,q", "app.pop_screen"),
    ]

    def compose(self) -> ComposeResult:
        self.rows = Rows(Column("Setting", 28), Column("Value"))
        self.detail = Static(id="detail")
        yield TitleBar("Settings")
        yield self.rows
        yield self.detail
        yield Hints(extra=(("enter", "change"), ("del", "default"), ("esc", "back")))

    def on_mount(self) -> None:
        self._fill()

    def on_rows_highlighted(self, event: Rows.Highlighted) -> None:
        if event.row is not None:
            table, name = event.row.key
            words = known_settings(dict(_TABLES)[table])[name][1].help
            path = one_line(str(self.app.settings_path))
            self.detail.update(
                Content.assemble((words, "$foreground"), f"\n\nkeys and presets: {path}")
            )

    def _fill(self) -> None:
        rows = []
        for table, cls in _TABLES:
            values = self.app.settings.sampling if table else self.app.settings
            for name in known_settings(cls):
                value = getattr(values, name)
                same = value == getattr(cls(), name)
                text = Content.styled(_shown(value), "$foreground 60%" if same else "$text-accent")
                full = f"{table}.{name}" if table else name
                rows.append(Row((table, name), (Content(full), text)))
        self.rows.show(rows)

    def on_rows_chosen(self) -> None:
        self.action_change()

    def action_change(self) -> None:
        row = self.rows.chosen
        if row is None:
            return
        table, name = row.key
        cls = dict(_TABLES)[table]
        kind, about = known_settings(cls)[name]
        value = getattr(self.app.settings.sampling if table else self.app.settings, name)
        if name == "theme":
            self.app.search_themes()
        elif kind is bool:
            self._set(table, name, not value)
        else:

            def done(text: str | None) -> None:
                if text is not None:
                    try:
                        self._set(table, name, parse_value(cls, name, text))
                    except ValueError as error:
                        self.app.tell(str(error), "warning")

            self.app.push_screen(Ask(f"{name}: {about.help}", _shown(value)), done)

    def action_reset(self) -> None:
        if row := self.rows.chosen:
            table, name = row.key
            cls = dict(_TABLES)[table]
            self._set(table, name, getattr(cls(), name), forget=True)

    def _set(self, table: str, name: str, value: Any, forget: bool = False) -> None:
        self.app.change_setting(table, name, value, forget=forget)
        self._fill()

    def on_screen_resume(self) -> None:
        self._fill()


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
