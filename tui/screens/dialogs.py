"""Two small questions: yes or no, and a line of text."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, Static


class Confirm(ModalScreen[bool]):
    """Asks before something is lost; Enter is yes only after ``y``, so no slip costs a model."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)"),
        Binding("n,escape,q", "dismiss(False)"),
    ]

    def __init__(self, question: str, detail: str = "") -> None:
        super().__init__()
        self._question, self._detail = question, detail

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Content(self._question), classes="question")
            if self._detail:
                yield Static(Content(self._detail), classes="detail")
            yield Static(
                Content.assemble(("y", "$text-primary"), " yes   ", ("n", "$text-primary"), " no"),
                classes="keys",
            )


class Ask(ModalScreen[str | None]):
    """Asks for a line of text; None when it was left with escape."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)")]

    def __init__(self, question: str, value: str = "", placeholder: str = "") -> None:
        super().__init__()
        self._question, self._value, self._placeholder = question, value, placeholder

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(Content(self._question), classes="question")
            yield Input(self._value, placeholder=self._placeholder, select_on_focus=False)
            yield Static(
                Content.assemble(("enter", "$text-primary"), " ok   ", ("esc", "$text-primary"),
                                 " cancel"),
                classes="keys",
            )  # fmt: skip

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if self.is_active:  # two Enters may come before the first has closed it
            self.dismiss(event.value.strip())
