"""What every screen asks of the app: notices, settings, files, chats."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxtx.tui.actions import ACTIONS
from mlxtx.tui.clean import clean, one_line, path_of
from mlxtx.tui.conversation import Conversation, import_chat
from mlxtx.tui.store import Store
from rich.text import Text
from textual.app import App

from mlxtx import settings as user_settings
from mlxtx.errors import MlxtxError

if TYPE_CHECKING:
    from mlxtx.tui.bridge import Bridge
    from mlxtx.tui.jobs import Jobs
    from mlxtx.tui.screens.chat import ChatScreen


def with_given(
    settings: user_settings.Settings, given: Mapping[str, Any]
) -> user_settings.Settings:
    """``settings`` with what the command line gave, for this run only."""
    known = user_settings.known_settings(user_settings.Sampling)
    sampling = {name: value for name, value in given.items() if name in known}
    own = {name: given[name] for name in ("model", "adapter", "kv", "system") if name in given}
    if "model" in own:
        # The adapter of the settings belongs to the model of the settings.
        own.setdefault("adapter", "")
    return replace(
        settings,
        **own,
        sampling=replace(settings.sampling, **sampling),
        chosen_sampling=settings.chosen_sampling | sampling.keys(),
    )


class Services(App[None]):
    """Mixed into the app."""

    chat: ChatScreen | None
    bridge: Bridge
    jobs: Jobs
    copied_with: str = ""
    settings: user_settings.Settings
    _problems: list[str]
    settings_path: Path
    store_path: Path | str

    @property
    def converted_folder(self) -> Path:
        """Where conversions go."""
        return user_settings.data_folder() / "models"

    @property
    def runs_folder(self) -> Path:
        """Where training runs, and so adapters, go."""
        return user_settings.data_folder() / "runs"

    @property
    def model_folders(self) -> list[str]:
        """Where to look for models beside the Hub cache."""
        return [*self.settings.model_folders, str(self.converted_folder), str(self.runs_folder)]

    @cached_property
    def store(self) -> Store:
        return Store(self.store_path, lambda line: self.tell(line, "error", timeout=20))

    def tell(self, text: str, severity: Any = "information", timeout: float = 6) -> None:
        """A short notice in the corner. ``text`` may come from anywhere: it is never markup."""
        self.notify(clean(text), severity=severity, timeout=timeout, markup=False)

    def _fatal_error(self) -> None:
        """A bug: leave with one line instead of a traceback, which goes to a file."""
        path = user_settings.data_folder() / "crash.log"
        details = traceback.format_exc()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(details, "utf-8", errors="replace")
            where = f"The details are in {path}."
        except OSError as error:
            where = f"The details could not be written to {path} ({error.strerror})."
        reason = one_line(details.strip().rsplit("\n", 1)[-1], 300)
        self.panic(Text(f"mlxtx stopped: {reason}\nYour chat is saved. {where}"))

    def copy_to_clipboard(self, text: str) -> None:
        """The system's own tool first, for all ways to copy: Textual's alone asks the terminal."""
        from mlxtx.tui.clipboard import copy_with_tool

        self.copied_with = copy_with_tool(text)
        if self.copied_with:
            self._clipboard = text
        else:
            super().copy_to_clipboard(text)

    # Settings

    def change_setting(self, table: str, name: str, value: Any, *, forget: bool = False) -> None:
        """Change a setting now and in the file; ``forget`` takes it out of the file instead."""
        if table == "sampling":
            sampling = replace(self.settings.sampling, **{name: value})
            chosen = self.settings.chosen_sampling - {name}
            chosen = chosen if forget else chosen | {name}
            self.settings = replace(self.settings, sampling=sampling, chosen_sampling=chosen)
        else:
            self.settings = replace(self.settings, **{name: value})
        if (table, name) == ("", "theme"):
            self.theme = value
        self._write_setting(table, name, None if forget else value)

    def save_preset(self, name: str, system: str, sampling: dict[str, Any]) -> None:
        """Keep a system prompt and sampling values under ``name``."""
        preset = user_settings.Preset(system, sampling)
        self.settings = replace(self.settings, presets={**self.settings.presets, name: preset})
        self._write_setting("presets", name, {"system": system, **sampling})
        self.tell(f"Saved the preset {name}.")

    def _known_keys(self) -> dict[str, str]:
        """The key map of the settings, but for what names no action."""
        known = {action.id for action in ACTIONS}
        for name in self.settings.keys.keys() - known:
            self._problems.append(f"keys.{name} names no action; it was skipped")
        return {name: keys for name, keys in self.settings.keys.items() if name in known}

    def _keep_theme(self, name: str) -> None:
        if name != self.settings.theme:
            self.change_setting("", "theme", name)

    def _write_setting(self, table: str, name: str, value: Any) -> None:
        try:
            user_settings.save_setting(table, name, value, self.settings_path)
        except (MlxtxError, OSError) as error:
            self.tell(f"It holds until you quit; it was not saved: {error}", "warning")

    # Files

    def save_text(self, path: Path, text: str) -> None:
        """Write ``text`` to a new file and say so; a file that is there is not touched."""
        from mlxtx.files import write_text_atomic

        try:
            if path.exists():
                raise MlxtxError(f"{path} exists already; name another file.")
            write_text_atomic(path, text)
        except (MlxtxError, OSError) as error:
            self.tell(str(error), "error")
        else:
            self.tell(f"Saved {path.resolve()}")

    def import_file(self, name: str) -> int | None:
        """Add the chat in a JSON file; gives its number."""
        path = path_of(name)
        try:
            chat = import_chat(self.store, path.read_text("utf-8", errors="replace"))
        except OSError as error:
            self.tell(f"{one_line(name)} was not read: {error.strerror}", "error")
        except ValueError as error:
            self.tell(f"{one_line(name)} was not imported: {error}", "error")
        else:
            self.tell(f"Imported {chat.title or 'a chat'}.")
            return chat.id
        return None

    # Chats

    def _shows(self, number: int) -> bool:
        return self.chat is not None and self.chat.conversation.chat.id == number

    def rename_chat(self, number: int, title: str) -> None:
        if self.chat is not None and self._shows(number):
            self.chat.conversation.rename(title)
            self.chat.show_status()
        else:
            self.store.update_chat(number, title=title, named=True)

    def delete_chat(self, number: int) -> None:
        """Hide the chat, and close it if it is the one that is shown."""
        if self.chat is not None and self._shows(number):
            self.chat.open(Conversation(self.store))
        self.store.delete_chat(number)
        if self.chat is not None:
            self.chat.undo_deleted.append(("chat", number))

    def restore_chat(self) -> bool:
        """Bring back the chat that was deleted last; False when there is none."""
        deleted = self.chat.undo_deleted if self.chat is not None else []
        last = next((entry for entry in reversed(deleted) if entry[0] == "chat"), None)
        if last is None:
            return False
        deleted.remove(last)
        self.store.restore_chat(last[1])
        return True

    # Leaving

    async def action_quit(self) -> None:
        """Leave. A training run saves its state before, at the end of the batch it is at: what is
        on the screen says so meanwhile."""
        running = [job for job in self.jobs.all if job.kind == "train" and job.state == "running"]
        if running:
            self.tell("The training run saves its state. mlxtx leaves after that.", timeout=600)
            self.run_worker(self._leave(), exclusive=True, group="leaving")
        else:
            self.exit()

    async def _leave(self) -> None:
        await self.bridge.close()
        self.exit()
