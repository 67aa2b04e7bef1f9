"""What a person can do in the chat: the methods behind the rows of ``actions`` for it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from mlxtx.tui.clean import clean, duration, one_line, path_of, size
from mlxtx.tui.conversation import Conversation
from mlxtx.tui.reply import Reply
from mlxtx.tui.store import Message
from mlxtx.tui.widgets.composer import Composer
from mlxtx.tui.widgets.message import MessageView
from mlxtx.tui.widgets.transcript import Transcript
from textual.screen import Screen

from mlxtx.settings import Sampling, parse_value

if TYPE_CHECKING:
    from mlxtx.tui.app import MlxtxApp


class ChatActions(Screen[None]):
    """The actions of ``ChatScreen``, which gives this state and these methods their meaning."""

    app: MlxtxApp
    conversation: Conversation
    reply: Reply | None
    editing: Message | None
    queue: list[tuple[str, list[dict[str, Any]]]]
    undo_deleted: list[tuple[str, Any]]
    transcript: Transcript
    composer: Composer

    @property
    def system(self) -> str:
        raise NotImplementedError

    @property
    def sampling(self) -> dict[str, Any]:
        raise NotImplementedError

    def answer(self, parent: int, goes_on: Message | None = None) -> None:
        raise NotImplementedError

    def end_reply(self) -> None:
        raise NotImplementedError

    def open(self, conversation: Conversation) -> None:
        raise NotImplementedError

    def show_path(self) -> None:
        raise NotImplementedError

    def show_status(self) -> None:
        raise NotImplementedError

    # The reply

    def action_stop(self) -> None:
        """Stop what is written; with nothing to stop, move between the input and the messages."""
        if self.reply is not None and self.app.model.state == "loading":
            self.end_reply()  # its job would hear of it only when the model is there
        elif self.reply is not None:
            self.app.bridge.stop(self.reply.job)
        elif self.editing is not None:
            self.end_editing()
            self.composer.clear_text()
        elif self.composer.has_focus and self.transcript.views:
            self.transcript.focus()
        else:
            self.composer.focus()

    def end_editing(self) -> None:
        """What is in the input is a new message."""
        self.editing = None
        self.composer.border_title = None

    def action_write(self) -> None:
        self.composer.focus()

    def _target(self, role: str = "") -> Message | None:
        """The message the reader means: the one under the cursor, else the last of ``role``."""
        if (view := self.transcript.chosen) is not None and role in ("", view.message.role):
            return view.message
        path = self.conversation.path()
        return next((m for m in reversed(path) if role in ("", m.role)), None)

    def _idle(self) -> bool:
        if self.reply is not None:
            self.app.tell("Wait for the reply, or stop it with esc.", "warning")
        return self.reply is None

    def action_regenerate(self) -> None:
        message = self._target()
        if message is None or not self._idle():
            return
        parent = message.id if message.role == "user" else message.parent
        if parent is not None:
            self.answer(parent)

    def action_continue(self) -> None:
        message = self._target("assistant")
        if message is None or not self._idle():
            return
        if message.id != self.conversation.chat.head:
            self.app.tell("Only the last reply can go on.", "warning")
        elif message.parent is not None:
            self.answer(message.parent, goes_on=message)

    def action_edit(self) -> None:
        message = self._target("user")
        if message is not None and self._idle():
            self.editing = message
            self.composer.rewrite(message.text, message.attachments)
            self.composer.border_title = "editing · enter sends it beside the old one · esc cancels"
            self.composer.focus()

    def action_step(self, step: int) -> None:
        """Show another version of the message under the cursor."""
        if (message := self._target()) is not None:
            self.action_version(message.id, step)

    def action_version(self, number: int, step: int) -> None:
        if not self._idle():
            return
        message = self.conversation.message(number)
        at = self.transcript.cursor
        if self.conversation.show_sibling(message, step):
            self.show_path()
            self.transcript.cursor = at

    def action_branch(self) -> None:
        """A new chat that holds what led to the chosen message."""
        message = self._target()
        if message is None or not self._idle():
            return
        copy = Conversation(self.app.store)
        copy.chat.title = self.conversation.chat.title
        copy.chat.settings = dict(self.conversation.settings)
        parent = None
        for old in self.conversation.path():
            kept = {k: v for k, v in vars(old).items() if k not in ("id", "chat", "parent")}
            parent = copy.add(Message(**kept), parent).id
            if old.id == message.id:
                break
        self.open(copy)
        self.app.tell("This is a copy; the chat it came from is as it was.")

    def action_delete_message(self) -> None:
        message = self._target()
        if message is None or not self._idle():
            return
        at = self.transcript.cursor
        gone = self.conversation.delete(message)
        self.undo_deleted.append(("messages", (self.conversation, gone)))
        if self.editing is not None and self.editing.id in gone:
            self.end_editing()
        self.show_path()
        self.transcript.cursor = min(at or 0, len(self.transcript.views) - 1)
        self.app.tell("Deleted, with what followed. u or /undo brings it back.")

    def on_transcript_typed(self, event: Transcript.Typed) -> None:
        self.composer.focus()
        self.composer.insert(event.character)

    # Folding

    def on_transcript_picked(self, event: Transcript.Picked) -> None:
        self._fold(event.view)

    def action_fold(self, number: int) -> None:
        if (view := self.transcript.view_of(number)) is not None:
            self._fold(view)

    def _fold(self, view: MessageView) -> None:
        view.unfolded = not view.unfolded
        following = self.transcript.following
        self.transcript.following = False
        self.transcript.changed(view)
        self.transcript.following = following

    def action_thinking(self) -> None:
        views = [view for view in self.transcript.views if view.message.thinking]
        unfold = not any(view.unfolded for view in views)
        for view in views:
            view.unfolded = unfold
            self.transcript.changed(view)

    # Chats

    def action_new(self) -> None:
        settings = {k: v for k, v in self.conversation.settings.items() if k == "sampling"}
        self.open(Conversation(self.app.store))
        self.conversation.chat.settings = settings

    def action_rename(self, title: str = "") -> None:
        if title.strip():
            self.conversation.rename(one_line(title, 120))
            self.show_status()
        else:
            self.composer.rewrite(f"/rename {self.conversation.chat.title}", [])

    def action_delete(self) -> None:
        number = self.conversation.chat.id
        if number:
            self.app.delete_chat(number)
            self.app.tell("The chat was deleted. /undo brings it back.")

    def action_undo(self) -> None:
        if not self.undo_deleted:
            self.app.tell("There is nothing to undo.", "warning")
            return
        if not self._idle():
            return
        kind, what = self.undo_deleted.pop()
        if kind == "chat":
            self.app.store.restore_chat(what)
            self.app.open_chat(what)
            return
        conversation, numbers = what
        conversation.restore(numbers)
        reading = self.transcript.has_focus
        self.open(conversation)
        if reading:
            self.transcript.focus()

    # Settings of this chat

    def action_model(self, name: str = "") -> None:
        if name:
            self.app.load_model(name)
        else:
            self.app.action_models()

    def action_adapter(self, folder: str = "") -> None:
        if folder and not os.path.isdir(path_of(folder)):
            self.app.tell(f"There is no folder {one_line(folder)}.", "error")
            return
        self.app.load_model(self.app.model.name, str(path_of(folder)) if folder else "")

    def action_kv(self, setting: str = "") -> None:
        self.app.model.kv = setting
        self.app.tell(f"KV cache: {setting or 'not quantized'}, from the next message on.")
        self.show_status()

    def action_system(self, text: str = "") -> None:
        if text:
            self.conversation.change_settings(system=text)
            self.app.tell("The system prompt holds from the next message on.")
        else:
            self.action_sampling()

    def action_set(self, text: str = "") -> None:
        name, _, value = text.partition(" ")
        try:
            values = {name: parse_value(Sampling, name, value)}
        except ValueError as error:
            self.app.tell(f"{error}", "warning")
            return
        self.change_sampling(values)
        self.app.tell(f"{name} is {values[name]}")

    def change_sampling(self, values: dict[str, Any]) -> None:
        own = self.conversation.settings.get("sampling", {})
        self.conversation.change_settings(sampling={**own, **values})

    def action_preset(self, name: str = "") -> None:
        presets = self.app.settings.presets
        if name not in presets:
            known = ", ".join(presets) or "none yet: the settings file says how to add one"
            self.app.tell(f"Presets: {known}", "warning" if name else "information")
            return
        preset = presets[name]
        self.conversation.change_settings(system=preset.system, preset=name)
        self.change_sampling(preset.sampling)
        self.app.tell(f"Preset {name} holds from the next message on.")

    def action_sampling(self) -> None:
        from mlxtx.tui.screens.sampling import SamplingScreen

        self.app.push_screen(SamplingScreen(self))

    def action_attach(self, path: str = "") -> None:
        quoted = f'@"{path}"' if " " in path else f"@{path}"
        self.composer.insert(f"{quoted} ")
        self.composer.focus()

    # Copying and saving

    def action_copy(self, what: str = "") -> None:
        """The selected text, else the chosen message, else the last reply; "code", "all"."""
        selected = self.get_selected_text() if not what else None
        if selected:
            self._copy(selected, "the selection")
        elif what == "all":
            self._copy(self.conversation.to_markdown(), "the chat")
        elif what == "code":
            self.action_copy_code()
        elif message := self._target("" if self.transcript.chosen else "assistant"):
            self._copy(message.text, "the reply" if message.role == "assistant" else "the message")

    def action_copy_code(self) -> None:
        """The code block after the one copied last, in the chosen message or the last reply."""
        message = self._target("assistant")
        view = self.transcript.view_of(message.id) if message else None
        blocks = view.code_blocks if view else []
        if not blocks:
            self.app.tell("There is no code block in it.", "warning")
            return
        key = (message.id if message else 0, len(blocks))
        at = self._copied_code[1] + 1 if self._copied_code[0] == key else 0
        self._copied_code = (key, at % len(blocks))
        self._copy(blocks[at % len(blocks)], f"code block {at % len(blocks) + 1} of {len(blocks)}")

    _copied_code: tuple[tuple[int, int], int] = ((0, 0), 0)

    def _copy(self, text: str, name: str) -> None:
        text = clean(text)
        self.app.copy_to_clipboard(text)
        length = size(len(text.encode("utf-8", "replace")))
        self.app.tell(f"Copied {name} ({length}, {self.app.copied_with or 'by the terminal'}).")

    def action_export(self, text: str = "") -> None:
        kind, _, path = text.partition(" ")
        if kind not in ("md", "json"):
            kind, path = "md", text
        target = path_of(path.strip() or self._file_name(kind))
        self.app.save_text(
            target,
            self.conversation.to_json() if kind == "json" else self.conversation.to_markdown(),
        )

    def _file_name(self, ending: str) -> str:
        title = self.conversation.chat.title or "chat"
        words = "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-")
        return f"{words[:40] or 'chat'}.{ending}"

    def action_import(self, path: str = "") -> None:
        if not path:
            self.app.tell("Name a file: /import chat.json", "warning")
        elif number := self.app.import_file(path):
            self.app.open_chat(number)

    def action_stats(self) -> None:
        message = self._target("assistant")
        if message is None or not message.stats:
            self.app.tell("There are no figures yet.", "warning")
            return
        rows = []
        for name, value in message.stats.items():
            words = name.replace("_", " ").replace("tokens per second", "tokens a second")
            if name.endswith("_bytes"):
                text = size(value)
            elif name == "time_to_first_token":
                text = duration(value)
            else:
                text = f"{value:,.1f}" if isinstance(value, float) else f"{value}"
            rows.append(f"{words}: {text}")
        self.app.tell("\n".join(rows), timeout=15)

    def action_queue_clear(self) -> None:
        self.queue.clear()
        self.show_status()

    # Scrolling while the input has the focus

    def action_page_up(self) -> None:
        self.transcript.scroll_page_up(animate=False)

    def action_page_down(self) -> None:
        self.transcript.scroll_page_down(animate=False)

    def action_bottom(self) -> None:
        self.transcript.scroll_end(animate=False, immediate=True)
