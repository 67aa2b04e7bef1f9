"""The adapters of one model: put one on, take it off; the base model stays loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mlxtx.tui.clean import one_line
from mlxtx.tui.library import LocalModel, adapter_base, find_adapters
from mlxtx.tui.widgets.rows import Column, Row, Rows
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

if TYPE_CHECKING:
    from mlxtx.tui.app import MlxtxApp


class AdaptersScreen(ModalScreen[None]):
    app: MlxtxApp
    AUTO_FOCUS = "Rows"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "use"),
        Binding("escape,q", "dismiss"),
    ]

    def __init__(self, model: LocalModel) -> None:
        super().__init__()
        self._model = model

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog tall"):
            yield Static(Content(f"Adapters for {one_line(self._model.name)}"), classes="question")
            self.rows = Rows(Column("Adapter"), Column("Made for", 26, drop=1))
            yield self.rows
            yield Static(
                Content.assemble(("enter", "$text-primary"), " use   ", ("esc", "$text-primary"),
                                 " back"),
                classes="keys",
            )  # fmt: skip

    def on_mount(self) -> None:
        rows = [Row("", (Content("none"), Content("")))]
        for folder in dict.fromkeys([*self._model.adapters, *find_adapters(self.app.runs_folder)]):
            base = adapter_base(folder)
            same = base in ("", self._model.name, self._model.source)
            style = "" if same else "$foreground 50%"
            cells = (Content.styled(folder.name, style), Content.styled(one_line(base), style))
            rows.append(Row(str(folder), cells))
        self.rows.show(rows)

    def on_rows_chosen(self) -> None:
        self.action_use()

    def action_use(self) -> None:
        row = self.rows.chosen
        if row is not None:
            self.app.load_model(self._model.source, row.key)
            name = Path(row.key).name if row.key else "no adapter"
            self.app.tell(f"{self._model.name} with {name}")
            self.app.action_chat()
