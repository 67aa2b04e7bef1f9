"""One chat as a tree of messages with a chosen branch: what the chat screen shows and changes."""

from __future__ import annotations

import json
import math
from typing import Any

from mlxtx.tui.store import Chat, Message, Store

from mlxtx.settings import Sampling, checked

_TITLE_LENGTH = 60


class Conversation:
    """A chat of ``store``; it is written there when its first message comes, not before."""

    def __init__(self, store: Store, chat: Chat | None = None) -> None:
        self.store = store
        self.chat = chat or Chat()
        found = store.messages(chat.id) if chat else []
        self._messages: dict[int, Message] = {message.id: message for message in found}
        if self.chat.head not in self._messages:
            self.chat.head = self._newest_leaf(None)

    @property
    def settings(self) -> dict[str, Any]:
        return self.chat.settings

    def change_settings(self, **values: Any) -> None:
        self.chat.settings = {**self.chat.settings, **values}
        if self.chat.id:
            self.store.update_chat(self.chat.id, settings=self.chat.settings)

    def path(self) -> list[Message]:
        """The messages of the shown branch, first to last."""
        path: list[Message] = []
        number = self.chat.head
        while number is not None and number in self._messages:
            path.append(self._messages[number])
            number = path[-1].parent
        return path[::-1]

    def message(self, number: int) -> Message:
        return self._messages[number]

    def siblings(self, message: Message) -> list[Message]:
        """The versions of ``message``: all that share its parent, oldest first."""
        return [m for m in self._messages.values() if m.parent == message.parent]

    def add(self, message: Message, parent: int | None) -> Message:
        """Store ``message`` under ``parent`` and show the branch that ends with it."""
        if not self.chat.id:
            first_line = message.text.strip().split("\n", 1)[0]
            title = self.chat.title or first_line[:_TITLE_LENGTH] or "New chat"
            self.chat = self.store.add_chat(title, self.chat.settings)
        message.chat, message.parent = self.chat.id, parent
        self.store.add_message(message)
        self._messages[message.id] = message
        self.chat.head = message.id
        return message

    def save(self, message: Message, *names: str) -> None:
        """Write the columns ``names`` of ``message``."""
        self.store.update_message(message.id, **{name: getattr(message, name) for name in names})

    def show_sibling(self, message: Message, step: int) -> bool:
        """Show the branch of the version ``step`` places from ``message``; False at an end."""
        versions = self.siblings(message)
        at = versions.index(message) + step
        if not 0 <= at < len(versions):
            return False
        self._set_head(self._newest_leaf(versions[at].id))
        return True

    def delete(self, message: Message) -> list[int]:
        """Remove ``message`` and all that follows it; gives the numbers ``restore`` takes."""
        gone = [message.id]
        for other in self._messages.values():
            if other.parent in gone:
                gone.append(other.id)
        self.store.delete_messages(gone)
        versions = [m for m in self.siblings(message) if m.id != message.id]
        for number in gone:
            del self._messages[number]
        self._set_head(self._newest_leaf(versions[-1].id) if versions else message.parent)
        return gone

    def restore(self, numbers: list[int]) -> None:
        self.store.restore_messages(numbers)
        found = self.store.messages(self.chat.id)
        self._messages = {message.id: message for message in found}
        self._set_head(self._newest_leaf(numbers[0]))

    def rename(self, title: str) -> None:
        self.chat.title, self.chat.named = title.strip() or "Untitled", True
        if self.chat.id:
            self.store.update_chat(self.chat.id, title=self.chat.title, named=True)

    def _set_head(self, number: int | None) -> None:
        self.chat.head = number
        self.store.update_chat(self.chat.id, head=number)

    def _newest_leaf(self, number: int | None) -> int | None:
        """The end of the newest branch that goes through message ``number``."""
        while True:
            below = [m.id for m in self._messages.values() if m.parent == number]
            if not below:
                return number
            number = below[-1]

    def prompt(self, system: str = "") -> list[dict[str, Any]]:
        """The shown branch as a model wants it, with attached files in front of their message."""
        messages = [{"role": "system", "content": system}] if system.strip() else []
        for message in self.path():
            if message.role == "assistant" and not message.text:
                continue
            text = prompt_text(message)
            if messages and messages[-1]["role"] == message.role:
                # Nothing was said in between, and many templates want the roles to alternate.
                messages[-1]["content"] += f"\n\n{text}"
            else:
                messages.append({"role": message.role, "content": text})
        return messages

    def to_markdown(self) -> str:
        parts = [f"# {self.chat.title or 'Chat'}\n"]
        names = {"user": "You", "assistant": "Assistant"}
        for message in self.path():
            name = names.get(message.role, message.role)
            label = f"{name} ({message.model})" if message.model else name
            parts.append(f"\n## {label}\n\n{prompt_text(message).rstrip()}\n")
        return "".join(parts)

    def to_json(self) -> str:
        """The whole tree, all branches, as ``import_chat`` reads it."""
        messages = [
            {"id": m.id, "parent": m.parent, "role": m.role, "text": m.text}
            | {name: getattr(m, name) for name in _EXPORTED}
            for m in self._messages.values()
        ]
        chat = {"format": "mlxtx-chat-1", "title": self.chat.title, "head": self.chat.head,
                "settings": self.chat.settings, "messages": messages}  # fmt: skip
        return json.dumps(chat, indent=2, ensure_ascii=False) + "\n"


def prompt_text(message: Message) -> str:
    """What the model reads for ``message``: its attached files, then its text."""
    files = [
        f'<file name="{part["name"]}">\n{part["text"]}\n</file>\n\n' for part in message.attachments
    ]
    return "".join(files) + message.text


def import_chat(store: Store, text: str) -> Chat:
    """Add the chat in ``text``: our JSON export, or a plain list of {"role", "content"}.

    Raises ValueError with a line for people.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON (line {error.lineno})") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    whole = value if isinstance(value, dict) else {"messages": value}
    rows, settings = whole.get("messages"), whole.get("settings")
    if not isinstance(rows, list) or not rows:
        raise ValueError("it holds no list of messages")
    messages = [_imported(row, number) for number, row in enumerate(rows, 1)]
    conversation = Conversation(store)
    conversation.chat.title = str(whole.get("title") or "")
    conversation.chat.settings = _imported_settings(settings)
    numbers: dict[str, int] = {}  # by the number in the file, whatever was written there
    last: int | None = None
    for row, message in zip(rows, messages, strict=True):
        if message.role == "system":
            conversation.change_settings(system=message.text)
            continue
        parent = numbers.get(repr(row["parent"])) if "parent" in row else last
        last = conversation.add(message, parent).id
        numbers[repr(row.get("id", last))] = last
    if not numbers:
        raise ValueError("it holds no messages")
    chat = conversation.chat
    chat.head = numbers.get(repr(whole.get("head")), chat.head)
    store.update_chat(chat.id, head=chat.head)
    return chat


_EXPORTED = ("thinking", "thinking_seconds", "state", "model", "attachments", "stats")


def _imported_settings(values: Any) -> dict[str, Any]:
    """Those of a chat that are what they should be."""
    if not isinstance(values, dict):
        return {}
    kept = {
        name: values[name] for name in ("system", "preset") if isinstance(values.get(name), str)
    }
    if isinstance(values.get("sampling"), dict):
        kept["sampling"] = checked(Sampling, values["sampling"], "", [])
    return kept


def _imported(row: Any, number: int) -> Message:
    """One message of a file that anyone may have written."""
    text = row.get("text", row.get("content")) if isinstance(row, dict) else None
    if not isinstance(text, str) or row.get("role") not in ("user", "assistant", "system"):
        raise ValueError(f"message {number} has no role and text")
    message = Message(role=row["role"], text=text)
    for name in _EXPORTED:
        if type(row.get(name)) is type(getattr(message, name)):
            setattr(message, name, row[name])
    message.attachments = [
        part
        for part in message.attachments
        if isinstance(part, dict)
        and isinstance(part.get("name"), str)
        and isinstance(part.get("text"), str)
    ]
    for part in message.attachments:
        for name in ("bytes", "tokens"):
            if type(part.get(name)) is not int:
                part.pop(name, None)
    message.stats = {
        name: value
        for name, value in message.stats.items()
        if (isinstance(value, int | float) and math.isfinite(value)) or name == "error"
    }
    if message.state not in ("done", "stopped", "failed", "lost"):
        message.state = "done"
    return message
