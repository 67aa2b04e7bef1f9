"""One reply while it is generated: events in, a message that grows and is saved as it grows."""

from __future__ import annotations

import time

from mlxtx.tui.conversation import Conversation
from mlxtx.tui.store import Message
from mlxtx.tui.widgets.bars import Figures

from mlxtx.engine import Generate
from mlxtx.events import Delta, Done, Event, Failed, Prefill, Stats

# Text that a crash may cost; the promise is two seconds.
SAVE_SECONDS = 1.0


class Reply:
    """Feeds the events of job ``job`` to ``message`` and to ``figures``."""

    def __init__(self, conversation: Conversation, message: Message, figures: Figures) -> None:
        self.conversation = conversation
        self.message = message
        self.figures = figures
        self.job = 0
        self.request = Generate(messages=[])
        # Whether anything has come: before that its model may still be loading.
        self.begun = False
        self._unsaved = False
        self._saved_at = time.monotonic()
        self._thinking_from: float | None = None
        self._prompt_tokens = 0

    @property
    def running(self) -> bool:
        return self.message.state == "streaming"

    def take(self, event: Event) -> None:
        """Apply one event. After ``Done`` or ``Failed`` the message has its final state."""
        self.begun = True
        if isinstance(event, Delta):
            self._add(event)
        elif isinstance(event, Prefill):
            f = self.figures
            f.prefill_done, f.prefill_total = event.done, event.total
            f.prefill_seconds = event.seconds
            f.context_used = self._prompt_tokens = event.total
        elif isinstance(event, Stats):
            self._take_stats(event)
        elif isinstance(event, Done):
            if event.stats is not None:
                self._take_stats(event.stats)
            self.finish("stopped" if event.reason == "stopped" else "done", event.reason)
        elif isinstance(event, Failed):
            self.message.stats = {**self.message.stats, "error": event.message}
            self.finish("failed")

    def _add(self, event: Delta) -> None:
        now = time.monotonic()
        message = self.message
        self.figures.prefill_done = self.figures.prefill_total
        if event.kind == "thinking":
            self._thinking_from = self._thinking_from or now
            message.thinking += event.text
            message.thinking_seconds = now - self._thinking_from
        else:
            self._thinking_from = None
            message.text += event.text
        self._unsaved = True
        if now - self._saved_at >= SAVE_SECONDS:
            self.save()

    def _take_stats(self, stats: Stats) -> None:
        f = self.figures
        f.speed = stats.decode_tokens_per_second or f.speed
        f.first_token = stats.time_to_first_token or f.first_token
        f.cache_bytes = stats.cache_bytes or f.cache_bytes
        f.memory = stats.memory_bytes or f.memory
        prompt = stats.prompt_tokens or self._prompt_tokens
        f.context_used = prompt + stats.generated_tokens
        self.message.stats = {
            **self.message.stats,
            **{name: value for name, value in vars(stats).items() if value and name != "job"},
            "prompt_tokens": prompt,
        }

    def finish(self, state: str, reason: str = "") -> None:
        self.message.state = state
        if reason == "length":
            self.message.stats = {**self.message.stats, "length": True}
        self.conversation.save(
            self.message, "text", "thinking", "thinking_seconds", "state", "stats"
        )
        self._unsaved = False

    def save(self) -> None:
        """Write what has come so far, if anything has since the last time."""
        if self._unsaved and self.running:
            self._unsaved = False
            self._saved_at = time.monotonic()
            self.conversation.save(self.message, "text", "thinking", "thinking_seconds")
