"""The command palette's rows for conversations and models; actions come from their table."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from mlxtx.tui.clean import one_line
from textual.command import Hit, Hits, Provider

if TYPE_CHECKING:
    from mlxtx.tui.app import MlxtxApp

_SHOWN = 200


class OpenProvider(Provider):
    """Opens a conversation by its title, or loads a model that is on this machine."""

    def _rows(self) -> Iterator[tuple[str, str, Any]]:
        from mlxtx.tui.library import local_models

        app = cast("MlxtxApp", self.app)
        for chat in app.store.chats(_SHOWN):
            yield f"Open: {one_line(chat.title)}", "conversation", partial(app.open_chat, chat.id)
        for model in local_models(app.model_folders):
            yield f"Use: {model.name}", "model", partial(app.load_model, model.source)

    async def startup(self) -> None:
        self._found = list(self._rows())

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for title, words, command in self._found:
            if (score := matcher.match(title)) > 0:
                yield Hit(score, matcher.highlight(title), command, help=words)
