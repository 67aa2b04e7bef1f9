"""The chat: transcript, input, meters; one reply at a time, written while it comes."""

from __future__ import annotations

from typing import Any

from mlxtx.tui import attach
from mlxtx.tui.actions import bindings, slash_commands
from mlxtx.tui.clean import clean, one_line, size
from mlxtx.tui.conversation import Conversation, prompt_text
from mlxtx.tui.lines import BLANK, Line, wrap
from mlxtx.tui.reply import SAVE_SECONDS, Reply
from mlxtx.tui.screens.chat_actions import ChatActions
from mlxtx.tui.store import Message
from mlxtx.tui.widgets.bars import Figures, Hints, Meters, TitleBar
from mlxtx.tui.widgets.composer import Completions, Composer, expanded
from mlxtx.tui.widgets.message import MessageView
from mlxtx.tui.widgets.transcript import Transcript
from textual.app import ComposeResult
from textual.containers import Center, Vertical
from textual.content import Content
from textual.widgets import Static

from mlxtx.checkpoint.bundled import NAME as BUNDLED
from mlxtx.engine import Count, Generate
from mlxtx.errors import MlxtxError
from mlxtx.events import Done, Event
from mlxtx.settings import Sampling

_GUIDE = (
    "This is the small built-in guide. Ask it about this program, or how a language model works. "
    "For a bigger one press f3: what is here, what the Hub has, what fits."
)
_FIRST_KEYS = (
    ("f1", "all keys and commands"),
    ("f3", "models: here, on the Hub, what fits"),
    ("f5", "earlier conversations"),
    ("@", "attach a file"),
    ("/", "commands"),
)
_SEND = (("enter", "send"),)
# Options of a reply that have no setting: they come from the command line alone.
_ONLY_GIVEN = ("presence_penalty", "frequency_penalty", "stop", "logit_bias", "prefill_chunk")
# Wait for a pause in the typing before files are read and counted.
_COUNT_DELAY = 0.4
_CHARACTERS_A_TOKEN = 4
_CountKey = tuple[str, int, str]


class ChatScreen(ChatActions):
    BINDINGS = bindings("chat")
    AUTO_FOCUS = "Composer"

    def __init__(self, conversation: Conversation) -> None:
        super().__init__()
        self.conversation = conversation
        self.figures = Figures()
        self.reply: Reply | None = None
        self.queue: list[tuple[str, list[dict[str, Any]]]] = []
        self.editing: Message | None = None
        self.undo_deleted: list[tuple[str, Any]] = []
        self._counted: dict[_CountKey, int] = {}

    def compose(self) -> ComposeResult:
        completions = Completions()
        self.title_bar, self.meters = TitleBar(), Meters()
        self.transcript, self.composer = Transcript(self._empty_lines), Composer(completions)
        self.waiting, self.hints = Static(id="waiting"), Hints("chat", "app", extra=_SEND)
        yield self.title_bar
        yield self.transcript
        # In a wide terminal these stand under the column of text, not across the whole screen.
        with Center(), Vertical(id="bottom"):
            yield completions
            yield self.waiting
            yield self.composer
            yield self.meters
            yield self.hints

    def on_mount(self) -> None:
        self.open(self.conversation)
        self.set_interval(SAVE_SECONDS, self._save)

    # What is shown

    def on_descendant_focus(self) -> None:
        if self.transcript.has_focus:
            self.hints.choose("messages", "app")
        else:
            self.hints.choose("chat", "app", extra=_SEND)

    def open(self, conversation: Conversation) -> None:
        """Show another chat; a reply that still runs in the old one is stopped."""
        self.end_reply()
        self.conversation = conversation
        self.figures = Figures()
        self.end_editing()
        self.show_path()
        self.show_status()
        self.composer.focus()

    def show_path(self) -> None:
        """Bring the transcript up to date with the shown branch."""
        known = {view.message.id: view for view in self.transcript.views}
        views = []
        for message in self.conversation.path():
            view = known.get(message.id)
            if view is None or view.message is not message:
                view = MessageView(message)
                view.unfolded = self.app.settings.show_thinking and message.role == "assistant"
            versions = self.conversation.siblings(message)
            view.version, view.versions = versions.index(message) + 1, len(versions)
            views.append(view)
        self.transcript.show(views)
        self._show_title()

    def show_status(self) -> None:
        """Bring the title, the meters and the queue up to date."""
        model = self.app.model
        f = self.figures
        f.context_size, f.memory_limit = model.context, model.memory_limit
        f.cache_setting = model.kv
        f.failed = model.state in ("failed", "dead")
        gone = model.state in ("none", "failed", "dead")
        f.memory = 0 if gone else f.memory or model.memory
        f.status = self._status()
        self.meters.set(f)
        self._show_title()
        self.waiting.display = bool(self.queue)
        if self.queue:
            first = one_line(self.queue[0][0], 60)
            self.waiting.update(Content(f"{len(self.queue)} waiting: {first}  (/unqueue drops)"))

    def _status(self) -> str:
        model = self.app.model
        if model.state == "loading":
            return f"loading {model.label}…"
        # The way out first: a narrow terminal cuts the end.
        if model.state == "dead":
            return f"f8 restarts the engine · {one_line(model.problem)}"
        if model.state == "failed":
            return f"f3 chooses a model · {one_line(model.problem)}"
        return ""

    def _show_title(self) -> None:
        model = self.app.model
        title = self.conversation.chat.title or "New chat"
        self.title_bar.set(title, model.label)

    def _empty_lines(self, width: int) -> list[Line]:
        model = self.app.model
        text = f"{model.label} answers on this machine. Nothing you write leaves it."
        if model.name == BUNDLED:
            text = _GUIDE
        column = min(60, width)
        lines = [Content.styled("mlxtx", ".empty-title"), Content("")]
        lines += [part.stylize(".note") for part in wrap(Content(text), column)]
        lines.append(Content(""))
        for key, words in _FIRST_KEYS:
            lines.append(Content.assemble((key.ljust(7), ".md-link"), (words, ".note")))
        margin = Content(" " * ((width - column) // 2))
        return [Line(margin + line) if line.plain else BLANK for line in lines]

    # Sending

    def on_composer_submitted(self, event: Composer.Submitted) -> None:
        event.stop()
        if not self._run_command(event.text, event.pastes):
            self.send(event.text, event.pastes)

    def _run_command(self, text: str, pastes: list[dict[str, Any]]) -> bool:
        """Run a slash command; False when ``text`` is none (a path may begin with a slash)."""
        if not text.startswith("/"):
            return False
        name, _, rest = text[1:].partition(" ")
        action = slash_commands().get(name.strip().lower())
        if action is None:
            if not name.isalpha():
                return False
            self.app.tell(
                f"There is no command /{one_line(name, 30)}. /help lists them.", "warning"
            )
            self.composer.give_back((text, pastes))
            return True
        target: Any = self.app if action.area == "app" else self
        method = getattr(target, f"action_{action.name}")
        result = method(expanded(rest, pastes).strip()) if action.usage else method()
        if result is not None:
            self.app.run_worker(result)
        return True

    def send(self, text: str, pastes: list[dict[str, Any]] | None = None) -> None:
        """Add a message of the user and let the model answer; wait while it writes."""
        if self.reply is not None:
            self.queue.append((text, pastes or []))
            self.show_status()
            return
        try:
            files = [attach.read(path) for path in attach.mentioned(text)]
        except MlxtxError as error:
            self.app.tell(str(error), "error")
            self._give_back((text, pastes or []))
            return
        attachments = [*(pastes or []), *files]
        for part in attachments:
            if "note" in part:
                self.app.tell(part.pop("note"), "warning")
            part["tokens"] = self._counted.get(self._count_key(part))
        parent = self.editing.parent if self.editing else self.conversation.chat.head
        self.end_editing()
        self.composer.border_subtitle = None
        message = Message(role="user", text=clean(text), attachments=attachments)
        self.conversation.add(message, parent)
        self.answer(message.id)

    def answer(self, parent: int, goes_on: Message | None = None) -> None:
        """Generate a reply under ``parent``, or let ``goes_on`` go on where it ended."""
        model = self.app.model
        if goes_on is None:
            message = Message(role="assistant", state="streaming", model=model.label)
            self.conversation.add(message, parent)
        else:
            message = goes_on
            message.state = "streaming"
            if not message.text:  # it was stopped while it thought: there is no beginning
                message.thinking, message.thinking_seconds = "", 0.0
            self.conversation.save(message, "state", "thinking", "thinking_seconds")
        self.figures = Figures(context_used=self.figures.context_used)
        reply = self.reply = Reply(self.conversation, message, self.figures)
        self.app.ensure_model()
        prompt = self.conversation.prompt(self.system)
        reply.request = Generate(
            messages=prompt,
            options=self._options(),
            defaults=vars(Sampling()),
            goes_on=bool(message.text),
        )
        reply.job = self.app.bridge.submit(reply.request, self._take)
        self.transcript.following = True
        self.show_path()
        if goes_on is not None and (view := self.transcript.view_of(message.id)):
            view.invalidate()
        self._note()
        self.show_status()

    def ask_again(self) -> None:
        """Let a reply that waits for a model wait for the one that loads now instead."""
        reply = self.reply
        if reply is None or not reply.job or reply.begun:
            return
        self.app.bridge.stop(reply.job)
        self.app.bridge.forget(reply.job)
        reply.message.model = self.app.model.label
        self.conversation.save(reply.message, "model")
        reply.job = self.app.bridge.submit(reply.request, self._take)

    @property
    def system(self) -> str:
        return str(self.conversation.settings.get("system", self.app.settings.system))

    @property
    def sampling(self) -> dict[str, Any]:
        """The values that hold for this chat: its own, else those of the command line, else those
        of the settings, else the model's, else ours."""
        return {**vars(Sampling()), **self.app.model.sampling, **self._chosen_sampling}

    @property
    def _chosen_sampling(self) -> dict[str, Any]:
        """Those of them that a person has chosen."""
        own = self.conversation.settings.get("sampling", {})
        settings = self.app.settings
        chosen = {name: getattr(settings.sampling, name) for name in settings.chosen_sampling}
        return {
            **chosen,
            **{name: value for name, value in own.items() if name in vars(Sampling())},
        }

    def _options(self) -> dict[str, Any]:
        given = {name: self.app.given[name] for name in _ONLY_GIVEN if name in self.app.given}
        options = {**given, **self._chosen_sampling}
        if self.app.model.kv:
            options["kv"] = self.app.model.kv
        return options

    # Events of the reply

    def _take(self, event: Event) -> None:
        reply = self.reply
        if reply is None or event.job != reply.job:
            return
        reply.take(event)
        self._note()
        if view := self.transcript.view_of(reply.message.id):
            self.transcript.changed(view)
        if not reply.running:
            self._reply_ended(reply)
        self.show_status()

    def _note(self) -> None:
        """What stands in place of a reply that has no text yet."""
        if self.reply is None or self.reply.message.text:
            return
        view = self.transcript.view_of(self.reply.message.id)
        if view is not None:
            loading = self.app.model.state == "loading"
            view.note = f"loading {self.app.model.label}…" if loading else "…"
            self.transcript.changed(view)

    def _reply_ended(self, reply: Reply) -> None:
        self.reply = None
        if self.queue and reply.message.state == "done":
            self.send(*self.queue.pop(0))
        else:
            # The reader wanted quiet, or nobody can answer.
            self._give_back()

    def _give_back(self, *unsent: tuple[str, list[dict[str, Any]]]) -> None:
        """Put ``unsent`` and all messages that wait back in the input."""
        waiting = [*unsent, *self.queue]
        self.queue.clear()
        if waiting:
            self.composer.give_back(*waiting)
        self.show_status()

    def drop_reply(self) -> None:
        """Stop a running reply for good: its text is kept, its later events are not wanted."""
        if self.reply is not None:
            self.app.bridge.stop(self.reply.job)
            self.app.bridge.forget(self.reply.job)
            self.reply.finish("stopped")
            self.reply = None

    def end_reply(self) -> None:
        """Drop a running reply, show that it ended and give back what waited for it."""
        reply = self.reply
        self.drop_reply()
        if reply is not None and (view := self.transcript.view_of(reply.message.id)):
            self.transcript.changed(view)
        self._give_back()

    def _save(self) -> None:
        if self.reply is not None:
            self.reply.save()

    def model_changed(self) -> None:
        """The app has loaded, lost or changed the model."""
        self._note()
        self.show_status()
        self.transcript.redraw_empty()

    # Files named in the input

    def on_text_area_changed(self) -> None:
        if "@" in self.composer.text:
            self.set_timer(_COUNT_DELAY, self._count_files)
        elif self.composer.border_subtitle:
            self.composer.border_subtitle = None

    def _count_files(self) -> None:
        shown = []
        for path in attach.mentioned(self.composer.text)[:4]:
            try:
                part = attach.read(path)
            except MlxtxError as error:
                shown.append(str(error))
                continue
            key, text = self._count_key(part), prompt_text(Message(attachments=[part]))
            if key in self._counted:
                shown.append(f"{path.name}: {self._counted[key]:,} tokens")
                continue
            about = max(1, len(text) // _CHARACTERS_A_TOKEN)
            shown.append(f"{path.name}: {size(part['bytes'])}, about {about:,} tokens")
            if self.app.model.state == "ready" and self.reply is None:
                self.app.bridge.submit(Count(text=text), self._counted_watcher(key))
        self.composer.border_subtitle = one_line(" · ".join(shown), 90) or None

    def _count_key(self, part: dict[str, Any]) -> _CountKey:
        """What its number of tokens depends on: the file as it is now, and the model."""
        return part["name"], hash(part["text"]), self.app.model.name

    def _counted_watcher(self, key: _CountKey) -> Any:
        def take(event: Event) -> None:
            if isinstance(event, Done) and "tokens" in event.details:
                self._counted[key] = event.details["tokens"]
                self._count_files()

        return take
