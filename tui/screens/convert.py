"""A quick conversion: fewer bits, or a recipe of bits; the source is not touched."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar

from mlxtx.tui.clean import one_line, path_of, size
from mlxtx.tui.library import LocalModel
from mlxtx.tui.widgets.choice import Choice
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from mlxtx.engine import Convert

if TYPE_CHECKING:
    from mlxtx.tui.app import MlxtxApp

_BITS = ("4", "8", "6", "5", "3", "2", "16 (bfloat16)")
# With a recipe, the layers that matter more get the second number of bits.
_RECIPES = ("same for all", "mixed_4_6", "mixed_4_8", "mixed_3_6", "mixed_3_4", "mixed_2_6")


class ConvertScreen(ModalScreen[None]):
    app: MlxtxApp
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "start"),
        Binding("escape", "dismiss"),
    ]

    def __init__(self, model: LocalModel) -> None:
        super().__init__()
        self._model = model

    def compose(self) -> ComposeResult:
        name = self._model.name.rsplit("/", 1)[-1]
        with Vertical(classes="dialog"):
            yield Static(Content(f"Convert {one_line(self._model.name)}"), classes="question")
            yield Static(
                Content(f"{size(self._model.bytes)}, {self._model.precision or 'type unknown'}"),
                classes="detail",
            )
            with Horizontal(classes="field"):
                yield Static("bits", classes="name")
                self.bits = Choice(*_BITS, id="bits")
                yield self.bits
            with Horizontal(classes="field"):
                yield Static("recipe", classes="name")
                self.recipe = Choice(*_RECIPES, id="recipe")
                yield self.recipe
            with Horizontal(classes="field"):
                yield Static("group size", classes="name")
                self.group = Choice("64", "32", "128", id="group")
                yield self.group
            self.out = Input(str(self.app.converted_folder / name), id="out")
            yield self.out
            yield Static(
                Content.assemble(("enter", "$text-primary"), " start   ", ("left right",
                                 "$text-primary"), " change   ", ("esc", "$text-primary"), " back"),
                classes="keys",
            )  # fmt: skip

    def on_input_submitted(self) -> None:
        self.action_start()

    def action_start(self) -> None:
        if not self.is_active:  # two Enters may come before the first has closed it
            return
        bits, recipe, group = self.bits.value, self.recipe.value, self.group.value
        options: dict[str, Any] = {"group_size": int(group)}
        if recipe != _RECIPES[0]:
            options["recipe"], ending = recipe, recipe.replace("_", "-")
        elif bits.isdigit():
            options["bits"], ending = int(bits), f"{bits}bit"
        else:
            options, ending = {"dtype": "bfloat16", "dequantize": True}, "bf16"
        out = path_of(self.out.value.strip())
        if out == self.app.converted_folder / self._model.name.rsplit("/", 1)[-1]:
            out = out.with_name(f"{out.name}-{ending}")
        if os.path.exists(out):
            self.app.tell(f"{out} exists already; name another folder.", "error")
            return
        # A Hub id would be looked up again; the folder is what was chosen.
        job = Convert(source=str(self._model.folder), out=str(out), options=options)
        self.app.jobs.start("convert", str(out), job)
        self.dismiss()
