"""The panel of the chat: system prompt, presets, sampling. What is changed holds for this chat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from mlxtx.tui.screens.dialogs import Ask
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.style import Style
from textual.widgets import Input, Static, TextArea

from mlxtx.settings import Sampling, known_settings, parse_value

if TYPE_CHECKING:
    from mlxtx.tui.app import MlxtxApp
    from mlxtx.tui.screens.chat_actions import ChatActions


class SamplingScreen(ModalScreen[None]):
    """Closes with escape and keeps every value that is right; a wrong one is marked and not taken."""

    app: MlxtxApp
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", priority=True),
        Binding("ctrl+s", "save_preset", priority=True),
    ]

    def __init__(self, chat: ChatActions) -> None:
        super().__init__()
        self._chat = chat
        self._conversation = chat.conversation
        self.fields: list[Input] = []

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="panel", can_focus=False):
            yield Static("System prompt", classes="label")
            self.system = TextArea(self._chat.system, compact=True, highlight_cursor_line=False)
            self.presets = Static(self._presets(), id="presets")
            self.about = Static(id="about", classes="detail")
            self.fields = [
                Input(self._text(name), id=name, compact=True, select_on_focus=False)
                for name in known_settings(Sampling)
            ]
            yield self.system
            yield Static("Presets", classes="label")
            yield self.presets
            yield Static("Sampling", classes="label")
            for field in self.fields:
                with Horizontal(classes="field"):
                    yield Static(str(field.id), classes="name")
                    yield field
            yield self.about
            yield Static(
                Content.assemble(("esc", "$text-primary"), " close   ", ("ctrl+s", "$text-primary"),
                                 " save as preset"),
                classes="keys",
            )  # fmt: skip

    def _text(self, name: str) -> str:
        value = self._chat.sampling[name]
        return f"{value:g}" if isinstance(value, float) else str(value)

    def _presets(self) -> Content:
        if not self.app.settings.presets:
            return Content.styled("none yet: ctrl+s saves what is here as one", "$foreground 60%")
        names = [
            Content.styled(name, "$text-primary").stylize(
                Style.from_meta({"@click": ("screen.preset", (name,))})
            )
            for name in self.app.settings.presets
        ]
        return Content("   ").join(names)

    def action_preset(self, name: str) -> None:
        self._chat.action_preset(name)
        self.system.load_text(self._chat.system)
        for field in self.fields:
            field.value = self._text(str(field.id))

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        known = known_settings(Sampling).get(str(event.widget.id))
        self.about.update(Content(known[1].help if known else ""))

    @on(Input.Changed)
    def _check(self, event: Input.Changed) -> None:
        event.input.set_class(self._value(event.input) is None, "-wrong")

    def _value(self, field: Input) -> Any:
        try:
            return parse_value(Sampling, str(field.id), field.value)
        except ValueError:
            return None

    def _values(self) -> dict[str, Any]:
        values = {str(field.id): self._value(field) for field in self.fields}
        return {
            name: value
            for name, value in values.items()
            if value is not None and value != self._chat.sampling[name]
        }

    def action_close(self) -> None:
        self._apply()
        self.dismiss()

    def on_unmount(self) -> None:
        # Keys that open another screen take this one away without closing it.
        if self.fields and self._chat.conversation is self._conversation:
            self._apply()

    def _apply(self) -> None:
        if values := self._values():
            self._chat.change_sampling(values)
        system = self.system.text
        if system != self._chat.system:
            self._chat.conversation.change_settings(system=system)

    def action_save_preset(self) -> None:
        def done(name: str | None) -> None:
            if name:
                self._apply()
                self.app.save_preset(name, self._chat.system, self._chat.sampling)
                self.presets.update(self._presets())

        self.app.push_screen(Ask("Name of the preset"), done)
