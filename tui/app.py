"""The terminal app: one screen for chat, models and training, over an engine in a child process.

Nothing here imports MLX; the engine's child does, when a model is loaded.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxtx.tui.actions import ACTIONS, bindings
from mlxtx.tui.bridge import Bridge, EngineFactory
from mlxtx.tui.clean import path_of
from mlxtx.tui.conversation import Conversation
from mlxtx.tui.jobs import Jobs, LongJob
from mlxtx.tui.library import tidy_download
from mlxtx.tui.model_state import ModelState
from mlxtx.tui.screens.chat import ChatScreen
from mlxtx.tui.services import Services, with_given
from mlxtx.tui.themes import THEMES
from mlxtx.tui.training import TrainRun
from textual.app import App, SystemCommand
from textual.message import Message
from textual.screen import Screen

from mlxtx import settings as user_settings
from mlxtx.engine import Load, Unload
from mlxtx.engine_process import EngineProcess
from mlxtx.events import Event, Failed, Loaded, Warned


def _open_provider() -> type[Any]:
    from mlxtx.tui.palette import OpenProvider

    return OpenProvider


class EngineEvents(Message):
    """A portion of events from the engine, in order."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        super().__init__()


class MlxtxApp(Services):
    CSS_PATH = Path(__file__).with_name("app.tcss")
    TITLE = "mlxtx"
    BINDINGS = bindings("app")
    COMMANDS = App.COMMANDS | {_open_provider}
    # Transitions cost CPU that the model could use.
    ANIMATION_LEVEL = "none"

    def __init__(
        self,
        *,
        make_engine: EngineFactory = EngineProcess,
        store_path: Path | str | None = None,
        settings_path: Path | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """``given``: options of the command line, which go before the settings."""
        super().__init__()
        self.settings_path = settings_path or user_settings.settings_path()
        self.settings, self._problems = user_settings.load_settings(self.settings_path)
        self.store_path = store_path or user_settings.data_folder() / "chats.db"
        given = {name: value for name, value in (given or {}).items() if value is not None}
        self.given = given
        self.settings = with_given(self.settings, given)
        options = {name: given[name] for name in ("dtype", "context", "force") if given.get(name)}
        self.model = ModelState(
            self.settings.model,
            self.settings.adapter,
            self.settings.kv,
            revision=given.get("revision"),
            options=options,
        )
        self.bridge = Bridge(self._post_events, self._engine_ended, make_engine)
        self.jobs = Jobs(self.bridge, self._job_changed)
        self.jobs_listeners: list[Callable[[LongJob], None]] = []
        self.training: TrainRun | None = None
        self._load = 0  # the job that loads the model
        # Model -> its memory plan, or why there is none.
        self.plans: dict[str, dict[str, Any] | str] = {}
        for theme in THEMES:
            self.register_theme(theme)
        self.chat: ChatScreen | None = None

    # Start and end

    def get_default_screen(self) -> Screen[Any]:
        self.chat = ChatScreen(Conversation(self.store))
        return self.chat

    def on_mount(self) -> None:
        self.animation_level = "none"
        theme = self.settings.theme
        if theme in self.available_themes:
            self.theme = theme
        else:
            self._problems.append(f"There is no theme {theme}; /theme lists them.")
            self.theme = "mlxtx-dark"
        self.set_keymap(self._known_keys())
        self.theme_changed_signal.subscribe(self, lambda theme: self._keep_theme(theme.name))
        self.call_after_refresh(self._after_first_paint)

    def _after_first_paint(self) -> None:
        # What was imported stays: looking through it again and again only makes pauses.
        gc.freeze()
        gc.enable()
        for line in self.store.notices:
            self.tell(line, "warning", timeout=20)
        if self._problems:
            self.tell("In the settings:\n" + "\n".join(self._problems), "warning", timeout=12)
        if self.chat is not None:
            earlier, typed = self.store.recent_messages(), self.chat.composer.sent
            # Somebody may have sent a message before this came to be called.
            known = {text for text, _ in earlier}
            self.chat.composer.sent = earlier + [sent for sent in typed if sent[0] not in known]
        if self.given.get("last") and (chats := self.store.chats()):
            self.open_chat(max(chats, key=lambda chat: chat.updated).id)
        self.ensure_model()  # which a message that was sent before has done already

    async def on_unmount(self) -> None:
        if self.chat is not None:
            self.chat.drop_reply()
        await self.bridge.close()
        self.store.close()

    # The engine

    def _post_events(self, events: list[Event]) -> None:
        self.post_message(EngineEvents(events))

    def on_engine_events(self, message: EngineEvents) -> None:
        for event in message.events:
            if isinstance(event, Warned):
                self.tell(event.message, "warning", timeout=20)
            else:
                self.bridge.dispatch(event)

    def _engine_ended(self, message: str, detail: str) -> None:
        self.model = replace(self.model, state="dead", problem=message, memory=0)
        self.tell(f"{message} Your chat is saved. f8 starts it again.", "error", timeout=20)
        self.log(detail)
        self._model_changed()

    def load_model(self, name: str, adapter: str = "") -> None:
        """Make ``name`` the model that answers, in the background."""
        self._forget_load()
        old = self.model
        same = old if name == old.name else ModelState()
        self.model = ModelState(
            name, adapter, old.kv, "loading", revision=same.revision, options=same.options
        )
        # the plan that says whether it fits counts the cache as it will be
        options = {**same.options, "kv": old.kv} if old.kv else same.options
        folder = str(path_of(adapter)) if adapter else None
        load = Load(model=name, adapter=folder, revision=same.revision, options=options)
        self._load = self.bridge.submit(load, self._take_load)
        if self.chat is not None:
            self.chat.ask_again()
        self._model_changed()

    def _forget_load(self) -> None:
        """What still loads is not wanted any more, and must not speak for what comes after it."""
        if self.model.state == "loading":
            self.bridge.stop(self._load)
        self.bridge.forget(self._load)

    def ensure_model(self) -> None:
        """Load the chosen model again if it is not there: after a failure or a dead engine."""
        if self.model.state not in ("ready", "loading"):
            self.load_model(self.model.name, self.model.adapter)

    def action_unload(self) -> None:
        """Give the model's memory back; the next message loads it again."""
        self._forget_load()
        self.model = replace(self.model, state="none", memory=0)
        self.bridge.submit(Unload(), lambda event: None)
        self._model_changed()

    def _take_load(self, event: Event) -> None:
        if isinstance(event, Loaded):
            self.model.state = "ready"
            self.model.context = event.context
            self.model.memory = event.bytes
            self.model.memory_limit = event.details.get("memory_limit")
            self.model.sampling = event.details.get("sampling", {})
        elif isinstance(event, Failed) and self.model.state != "dead":
            self.model.state, self.model.problem = "failed", event.message
            self.tell(f"{self.model.name}: {event.message}", "error", timeout=15)
        self._model_changed()

    def _model_changed(self) -> None:
        if self.chat is not None and self.chat.is_mounted:
            self.chat.model_changed()

    async def action_restart(self) -> None:
        """End the engine, whatever it does, and load the model again."""
        await self.bridge.restart()
        if self.chat is not None:
            self.chat.end_reply()
        self.load_model(self.model.name, self.model.adapter)

    def open_chat(self, number: int) -> None:
        """Show chat ``number`` in the chat screen."""
        found = self.store.chat(number)
        if found is None or self.chat is None:
            self.tell("That chat is gone.", "warning")
            return
        self.action_chat()
        if not self._shows(number):  # what is written is newer than what is saved
            self.chat.open(Conversation(self.store, found))

    def _job_changed(self, job: LongJob) -> None:
        if job.kind == "download":
            tidy_download(job.title, job.state)
        if job.state == "failed":
            self.tell(f"{job.label}: {job.message}", "error", timeout=15)
        elif job.state == "done":
            self.tell(f"{job.label}: done")
        for listener in list(self.jobs_listeners):
            listener(job)

    # Screens

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        areas = ("app", "chat") if screen is self.chat else ("app",)
        for action in ACTIONS:
            if action.area in areas and action.name != "command_palette":
                target: Any = self if action.area == "app" else screen
                method = getattr(target, f"action_{action.name}")
                yield SystemCommand(action.title, _subtitle(action), method)

    def _show(self, name: str, *values: Any) -> None:
        """Put screen ``name`` over the chat; any other that is open goes away."""
        from importlib import import_module

        self.action_chat()
        module = import_module(f"mlxtx.tui.screens.{name}")
        self.push_screen(getattr(module, f"{name.capitalize()}Screen")(*values))

    def action_chat(self) -> None:
        while len(self.screen_stack) > 1:
            self.pop_screen()

    def action_help(self) -> None:
        self._show("help")

    def action_models(self, words: str = "") -> None:
        self._show("models", words)

    def action_train(self, data: str = "") -> None:
        self._show("train", data)

    def action_chats(self, words: str = "") -> None:
        self._show("chats", words)

    def action_settings(self) -> None:
        self._show("settings")

    def action_theme(self, name: str = "") -> None:
        if name in self.available_themes:
            self.theme = name
        elif name:
            self.tell(f"Themes: {', '.join(sorted(self.available_themes))}", "warning")
        else:
            self.search_themes()


def _subtitle(action: Any) -> str:
    parts = [action.keys.split(",")[0], f"/{action.slash}" if action.slash else ""]
    return "  ".join(part for part in parts if part)


def main(argv: list[str] | None = None) -> int:
    """What ``mlxtx`` and ``mlxtx chat`` open on a terminal. Gives the exit code."""
    from mlxtx.scripts import chat

    argv = sys.argv[1:] if argv is None else argv
    options = chat.arguments(argv)
    settings, _ = user_settings.load_settings()
    plain = options.plain or settings.plain or bool(os.environ.get("NO_COLOR"))
    if plain or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        gc.enable()
        return chat.main(["--plain", *argv]) or 0
    # What a shell exported is the size its window once had; the terminal knows the present one.
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)
    app = MlxtxApp(given=vars(options))
    app.run()
    return app.return_code or 0
