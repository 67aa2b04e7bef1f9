"""One of a few words, changed with left and right or a click."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.widget import Widget


class Choice(Widget, can_focus=True):
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)"),
        Binding("right,space", "step(1)"),
    ]

    class Changed(Message):
        """Another word was chosen."""

    def __init__(self, *words: str, value: str = "", id: str | None = None) -> None:
        super().__init__(id=id)
        self.words = words
        self._at = words.index(value) if value in words else 0

    @property
    def value(self) -> str:
        return self.words[self._at]

    def action_step(self, step: int) -> None:
        self._at = (self._at + step) % len(self.words)
        self.refresh(layout=True)
        self.post_message(self.Changed())

    def on_click(self) -> None:
        self.action_step(1)

    def render(self) -> Content:
        arrows = "$text-primary" if self.has_focus else "$foreground 40%"
        return Content.assemble(("◂ ", arrows), self.value, (" ▸", arrows))

    def on_focus(self) -> None:
        self.refresh()

    def on_blur(self) -> None:
        self.refresh()
