"""Long jobs and how they stand: downloads, conversions, training runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlxtx.tui.bridge import Bridge
from mlxtx.tui.clean import duration, one_line, size

from mlxtx.engine import Download, Job
from mlxtx.events import Done, Event, Failed, Progress

Listener = Callable[["LongJob", Event | None], None]


@dataclass
class LongJob:
    """``state``: "running", "pausing", "paused", "cancelling", "cancelled", "done" or "failed"."""

    kind: str
    title: str
    job: Job
    state: str = "running"
    number: int = 0
    progress: Progress | None = None
    message: str = ""
    path: str = ""
    # What goes on after a pause, where that is not the same job once more.
    again: Job | None = None
    # A download is held where it is: what stops it throws away the file it was at.
    held_since: float | None = None
    held_seconds: float = 0.0
    listeners: list[Listener] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The title, short enough for a line: of a path its last part."""
        name = Path(self.title).name if Path(self.title).is_absolute() else self.title
        return f"{self.kind} {name}"

    @property
    def open(self) -> bool:
        return self.state in ("running", "pausing", "paused", "cancelling")

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        p = self.progress
        return min(1.0, p.done / p.total) if p is not None and p.total else 0.0

    def line(self) -> str:
        """How it stands, in words."""
        if self.state in ("failed", "cancelled", "done", "pausing", "cancelling"):
            return one_line(self.message) if self.state == "failed" else self.state
        p = self.progress
        if p is None:
            return self.state if self.state != "running" else "starting"
        if p.unit == "bytes":
            text = f"{size(p.done)} of {size(p.total)}"
            if p.seconds > 1 and self.state == "running":
                text += f", {size(p.done / p.seconds)}/s"
        else:
            text = f"{p.done:,.0f} of {p.total:,.0f} {p.unit}"
        if self.state == "paused":
            return f"paused at {text}"
        return f"{text}, {duration(p.seconds_left)} left" if p.seconds_left else text


class Jobs:
    """Starts jobs and keeps them until the app ends. ``changed`` is called after every change."""

    def __init__(self, bridge: Bridge, changed: Callable[[LongJob], None]) -> None:
        self._bridge = bridge
        self._changed = changed
        self.all: list[LongJob] = []

    def start(self, kind: str, title: str, job: Job, listener: Listener | None = None) -> LongJob:
        long_job = LongJob(kind, title, job, listeners=[listener] if listener else [])
        self.all.append(long_job)
        self._run(long_job)
        return long_job

    def _run(self, long_job: LongJob) -> None:
        long_job.state, long_job.message = "running", ""
        long_job.number = self._bridge.submit_long(
            long_job.job, lambda event: self._take(long_job, event)
        )
        self._changed(long_job)

    def open_of(self, kind: str, title: str) -> LongJob | None:
        """The one of this kind and title that is not over."""
        return next((j for j in self.all if (j.kind, j.title) == (kind, title) and j.open), None)

    def pause(self, long_job: LongJob) -> None:
        """Stop it with its state kept, or go on with one that is paused."""
        if long_job.held_since is not None:
            self._let_go(long_job)
        elif long_job.state == "paused":
            long_job.job = long_job.again or long_job.job
            self._run(long_job)
        elif long_job.state == "running" and isinstance(long_job.job, Download):
            self._bridge.hold(long_job.number, True)
            long_job.state, long_job.held_since = "paused", time.monotonic()
            self._changed(long_job)
        elif long_job.state == "running":
            self._stop(long_job, "pausing")

    def _let_go(self, long_job: LongJob) -> None:
        assert long_job.held_since is not None
        long_job.held_seconds += time.monotonic() - long_job.held_since
        long_job.state, long_job.held_since = "running", None
        self._bridge.hold(long_job.number, False)
        self._changed(long_job)

    def cancel(self, long_job: LongJob) -> None:
        if long_job.held_since is not None:
            self._let_go(long_job)
        if long_job.state == "paused":
            long_job.state = "cancelled"
            self._changed(long_job)
        elif long_job.open:
            self._stop(long_job, "cancelling")

    def _stop(self, long_job: LongJob, state: str) -> None:
        long_job.state = state
        self._bridge.stop(long_job.number)
        self._changed(long_job)

    def _take(self, long_job: LongJob, event: Event) -> None:
        # A job that was stopped ends as it was asked to, even if its process had to be ended.
        stopped = {"pausing": "paused", "cancelling": "cancelled"}.get(long_job.state)
        if isinstance(event, Progress):
            if event.stage != "sample":
                running = max(0.0, event.seconds - long_job.held_seconds)
                long_job.progress = replace(event, seconds=running)
        elif isinstance(event, Done):
            ended = event.reason == "stopped"
            long_job.state = (stopped or "paused") if ended else "done"
            long_job.path = str(event.details.get("path", ""))
        elif isinstance(event, Failed):
            long_job.state = stopped or "failed"
            long_job.message = event.message
        for listener in long_job.listeners:
            listener(long_job, event)
        self._changed(long_job)
