"""Stop strings, which may span tokens and are never shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on until one of ``stops`` appears; text that may begin one is held back.

    ``push`` returns what is safe to show. Once ``found`` is set, the text ended right before
    the stop string, and nothing more comes out. Only as much text as the longest stop string is
    ever looked at again.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.longest = max((len(stop) for stop in self.stops), default=0)
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        if self.found is not None:
            return ""
        text, self._held = self._held + text, ""
        matches = [(text.find(stop), stop) for stop in self.stops if stop in text]
        if matches:
            start, self.found = min(matches)
            return text[:start]
        hold = self._possible_start(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(self.longest - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self.stops):
                return length
        return 0

    def finish(self) -> str:
        """The text held back that turned out to be no stop string."""
        text, self._held = self._held, ""
        return "" if self.found is not None else text
