"""Every action once: its keys, slash command, palette entry, footer hint and line of help.

A screen has a method ``action_NAME`` for each of its rows; a row with ``usage`` may get the text
after the slash command as its argument. Nothing is bound to Alt alone, which many terminals keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from textual.binding import Binding, BindingType

AREAS = {
    "app": "Everywhere",
    "chat": "Chat",
    "messages": "On a message (esc from the input)",
    "chats": "Conversations",
    "models": "Models",
    "train": "Training",
}


@dataclass(frozen=True)
class Action:
    """One thing a person can do.

    name:  the method is ``action_{name}``; the id in the [keys] table of the settings is
           ``{area}.{name}``
    keys:  default keys, comma separated, the first is shown
    slash: the command without its slash; "" has none
    usage: what may stand after the command
    hint:  the word in the footer; "" keeps it out
    """

    area: str
    name: str
    title: str
    keys: str = ""
    slash: str = ""
    usage: str = ""
    hint: str = ""
    priority: bool = False

    @property
    def id(self) -> str:
        return f"{self.area}.{self.name}"


ACTIONS = (
    Action("app", "chat", "Go to the chat", "f2", "chat"),
    Action("app", "models", "Models: here and on the Hub", "f3,ctrl+l", "models", "[words]",
           "models"),
    Action("app", "train", "Train an adapter", "f4", "train", "[data]"),
    Action("app", "chats", "Conversations: search, open", "f5,ctrl+o", "chats", "[words]", "chats"),
    Action("app", "settings", "Settings", "f6", "settings", priority=True),
    Action("app", "theme", "Choose the colours", "", "theme", "[name]"),
    Action("app", "unload", "Unload the model: free its memory", "", "unload"),
    Action("app", "restart", "Restart the engine", "f8", "restart"),
    Action("app", "help", "Keys and commands", "f1", "help", hint="help"),
    Action("app", "command_palette", "Search all actions", "ctrl+p", hint="actions"),
    Action("app", "quit", "Quit", "ctrl+q", "quit"),
    #
    Action("chat", "stop", "Stop the reply; else go to the messages", "escape",
           "stop", hint="stop"),
    Action("chat", "new", "New chat", "ctrl+n", "new", hint="new"),
    Action("chat", "regenerate", "Answer again, beside the reply there is", "ctrl+r", "regenerate"),
    Action("chat", "continue", "Let the last reply go on", "", "continue"),
    Action("chat", "edit", "Change your last message and send it again", "", "edit"),
    Action("chat", "model", "Answer with another model", "", "model", "[name]"),
    Action("chat", "adapter", "Switch the adapter; nothing takes it away", "", "adapter",
           "[folder]"),
    Action("chat", "sampling", "System prompt, presets and sampling", "ctrl+s", "sampling"),
    Action("chat", "system", "Set the system prompt of this chat", "", "system", "[text]"),
    Action("chat", "preset", "Use a preset of the settings", "", "preset", "[name]"),
    Action("chat", "set", "Set a sampling value", "", "set", "name value"),
    Action("chat", "kv", "Set the KV cache, such as k8v4g64", "", "kv", "[setting]"),
    Action("chat", "attach", "Attach a text file (or write @path)", "", "attach", "path"),
    Action("chat", "thinking", "Fold or unfold all thinking", "ctrl+t", "thinking"),
    Action("chat", "copy", "Copy the selection or the reply; code, all", "ctrl+g", "copy",
           "[code|all]"),
    Action("chat", "export", "Save the chat as Markdown or JSON", "", "export", "[md|json] [path]"),
    Action("chat", "rename", "Name this chat", "", "rename", "title"),
    Action("chat", "delete", "Delete this chat", "", "delete"),
    Action("chat", "undo", "Bring back what was deleted last", "", "undo"),
    Action("chat", "import", "Read a chat from a JSON file", "", "import", "path"),
    Action("chat", "stats", "Figures of the last reply", "", "stats"),
    Action("chat", "queue_clear", "Drop the messages that wait", "", "unqueue"),
    Action("chat", "page_up", "Scroll up", "pageup", priority=True),
    Action("chat", "page_down", "Scroll down", "pagedown", priority=True),
    Action("chat", "bottom", "Go to the end and follow it", "ctrl+end"),
    #
    Action("messages", "up", "Message above", "up,k"),
    Action("messages", "down", "Message below", "down,j"),
    Action("messages", "first", "First message", "home,g"),
    Action("messages", "last", "Last message", "end,G"),
    Action("messages", "pick", "Unfold or fold", "enter,space"),
    Action("messages", "screen.copy", "Copy it", "y,c", hint="copy"),
    Action("messages", "screen.copy_code", "Copy its next code block", "b", hint="code"),
    Action("messages", "screen.edit", "Edit and send again", "e", hint="edit"),
    Action("messages", "screen.regenerate", "Answer again from here", "r", hint="again"),
    Action("messages", "screen.step(-1)", "Version before", "left,[", hint="version"),
    Action("messages", "screen.step(1)", "Version after", "right,]"),
    Action("messages", "screen.branch", "New chat from here", "f"),
    Action("messages", "screen.delete_message", "Delete it and what follows", "d,delete"),
    Action("messages", "screen.undo", "Undo", "u"),
    Action("messages", "screen.write", "Back to the input", "i,tab", hint="write"),
    #
    Action("chats", "open", "Open", "enter", hint="open"),
    Action("chats", "back", "Back", "escape,q", hint="back"),
    Action("chats", "search", "Search in all messages", "slash", hint="search"),
    Action("chats", "rename", "Rename", "r", hint="rename"),
    Action("chats", "pin", "Pin or unpin", "p", hint="pin"),
    Action("chats", "delete", "Delete", "d,delete", hint="delete"),
    Action("chats", "undo", "Bring back what was deleted last", "u", hint="undo"),
    Action("chats", "export", "Export as JSON, all branches", "e", hint="export"),
    Action("chats", "import", "Import a chat", "i", hint="import"),
    #
    Action("models", "use", "Chat with it, or download it", "enter", hint="use"),
    Action("models", "back", "Back", "escape,q", hint="back"),
    Action("models", "search", "Search", "slash", hint="search"),
    Action("models", "switch", "On this machine, or on the Hub", "t", hint="here/Hub"),
    Action("models", "filter", "All models, or only those in MLX format", "m"),
    Action("models", "sort", "Sort by downloads, likes or date", "s"),
    Action("models", "adapters", "Its adapters", "a", hint="adapters"),
    Action("models", "convert", "Convert it", "c", hint="convert"),
    Action("models", "pause", "Pause the job, or go on with it", "p", hint="pause"),
    Action("models", "cancel", "Cancel the job", "x", hint="cancel"),
    Action("models", "delete", "Delete from this machine", "d,delete", hint="delete"),
    #
    Action("train", "preview", "Look at the data first", "ctrl+r", hint="dry run"),
    Action("train", "start", "Start, pause, or go on", "ctrl+s", hint="start/pause"),
    Action("train", "try", "Chat with the adapter", "ctrl+t", hint="chat with it"),
    Action("train", "back", "Back", "escape", hint="back"),
)  # fmt: skip


def bindings(area: str) -> list[BindingType]:
    """Textual bindings of ``area``, with ids for the key map of the settings. What has no key is
    bound to one that nobody can press, for the key map to change."""
    return [
        Binding(
            a.keys or f"unbound_{a.name}",
            a.name,
            a.title,
            show=bool(a.hint),
            priority=a.priority,
            id=a.id,
        )
        for a in ACTIONS
        if a.area == area
    ]


def keys_of(action: Action, chosen: Mapping[str, str]) -> str:
    """The keys of ``action``: those of the settings' key map, else its own."""
    return chosen.get(action.id, action.keys)


def slash_commands(areas: tuple[str, ...] = ("app", "chat")) -> dict[str, Action]:
    """What may be typed after a slash in the chat's input."""
    return {a.slash: a for a in ACTIONS if a.slash and a.area in areas}


def key_name(keys: str) -> str:
    """The first of ``keys`` as people write it: ctrl+r, esc, pgup."""
    short = {"slash": "/", "escape": "esc", "pageup": "pgup", "pagedown": "pgdn", "delete": "del"}
    first = keys.split(",")[0]
    return short.get(first, first)
