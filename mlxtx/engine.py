"""Jobs in, events out: the one owner of MLX.

MLX streams belong to the thread that made them, so loading and generating must happen on the same
thread: ``Engine`` runs every job, one after another, on a thread of its own. ``Stop`` does not wait
in that queue: it raises a flag that the running job looks at for every token (or progress report).

The same jobs and events travel as JSON lines to and from a child process
(``python -m mlxtx.engine``, see ``mlxtx.engine_process``), so that a Metal out-of-memory, which
kills its process, can't take the terminal app with it.

    engine = Engine(print)
    engine.submit(Load(model="bundled"))
    engine.submit(Generate(messages=[{"role": "user", "content": "Hello"}]))
    engine.close()
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mlxtx.errors import MlxtxError
from mlxtx.events import Done, Event, Failed

# Between two looks at whether a job that is held may go on.
_HELD_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something to do. Its number is given by ``submit`` and comes back in every event's ``job``."""


@dataclass(frozen=True, kw_only=True)
class Load(Job):
    """Make ``model`` (a folder, a Hub id or "bundled") the one that answers. Emits ``Loaded``.

    ``adapter``: a folder, or None. ``options`` go to ``mlxtx.load``.
    """

    model: str
    adapter: str | None = None
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Unload(Job):
    """Drop the model and give its memory back."""


@dataclass(frozen=True, kw_only=True)
class Generate(Job):
    """Answer ``messages`` ({"role", "content"} each); ``options`` go to ``LanguageModel.stream``.

    ``defaults``: options that give way to how the model's makers would sample, which is known when
    it is loaded. A seed below 0 is none. The cache is kept from one job to the next, so that only
    what is new in a chat is read. ``goes_on``: the last message is the beginning of the answer.
    """

    messages: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    goes_on: bool = False


@dataclass(frozen=True, kw_only=True)
class Count(Job):
    """How many tokens ``text`` has for the loaded model: ``Done.details["tokens"]``."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Plan(Job):
    """What ``model`` needs and whether it fits this machine: ``Done.details``, all in bytes."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Search(Job):
    """Models on the Hub: ``Done.details["models"]``, a list of plain dictionaries."""

    query: str
    author: str | None = None
    mlx_only: bool = False
    sort: str = "downloads"
    limit: int = 50


@dataclass(frozen=True, kw_only=True)
class Download(Job):
    """Fetch a Hub repository into the Hub cache; what is there already is not fetched again."""

    repo: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Convert(Job):
    """``mlxtx.convert(source, out, **options)``."""

    source: str
    out: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Train(Job):
    """``mlxtx.tune(model, data, out, **options)``."""

    model: str
    data: str
    out: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Preview(Job):
    """The dry run of ``Train``: samples with their masks, token counts and the memory plan."""

    model: str
    data: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stop(Job):
    """End job number ``job``: the running one within a token, a waiting one without starting it."""

    job: int


@dataclass(frozen=True, kw_only=True)
class Pause(Job):
    """Hold a long job number ``job`` at its next report, or let it go on (``on=False``)."""

    job: int
    on: bool = True


@dataclass(frozen=True, kw_only=True)
class Shutdown(Job):
    """Stop what runs, drop what waits and end the engine."""


class Stopped(KeyboardInterrupt):
    """Raised inside a long job when it was told to stop.

    A ``KeyboardInterrupt``, so that a job ends as it does on Ctrl-C: with its state saved.
    """


class Engine:
    """Runs jobs in the order they came on one thread; ``emit(event)`` is called on that thread."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._numbers = itertools.count(1)
        self._queue: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
        self._stopped: set[int] = set()
        self._held: set[int] = set()
        self._closing = False
        self._state: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._work, name="mlxtx-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, number: int | None = None) -> int:
        """Queue ``job`` and return its number. Safe to call from any thread."""
        number = next(self._numbers) if number is None else number
        if isinstance(job, Stop):
            self._stopped.add(job.job)
        elif isinstance(job, Pause):
            (self._held.add if job.on else self._held.discard)(job.job)
        else:
            self._closing = self._closing or isinstance(job, Shutdown)
            self._queue.put((number, job))
        return number

    def close(self, timeout: float = 5.0) -> None:
        """Stop what runs, drop what waits, and wait up to ``timeout`` seconds for the thread."""
        self.submit(Shutdown())
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            number, job = self._queue.get()
            if isinstance(job, Shutdown):
                return
            self._emit(replace(_run(job, self._running(number)), job=number))
            self._stopped.discard(number)

    def _running(self, number: int) -> Running:
        def emit(event: Event) -> None:
            self._emit(replace(event, job=number))

        def stopped() -> bool:
            return self._closing or number in self._stopped

        return Running(self._state, emit, stopped, lambda: number in self._held)


@dataclass(frozen=True)
class Running:
    """What a job sees of its engine.

    state    lives as long as the engine: the model is kept there
    emit     says something
    stopped  tells whether the job should end
    held     tells whether it should wait
    """

    state: dict[str, Any]
    emit: Callable[[Event], None]
    stopped: Callable[[], bool]
    held: Callable[[], bool] = lambda: False

    def report(self, event: Event) -> None:
        """The ``on_event`` of a long library call: it waits while the job is held, and ends the
        call when it was stopped."""
        self.emit(event)
        while self.held() and not self.stopped():
            time.sleep(_HELD_SECONDS)
        if self.stopped():
            raise Stopped


def _run(job: Job, running: Running) -> Event:
    """The event that ends ``job``."""
    try:
        if running.stopped():
            raise Stopped
        from mlxtx.engine_jobs import RUN

        return RUN[type(job)](job, running)
    except KeyboardInterrupt:
        return Done(reason="stopped")
    except MlxtxError as error:
        return Failed(message=str(error), detail=traceback.format_exc())
    except Exception as error:
        text = str(error).strip().splitlines()
        message = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
        return Failed(message=message, detail=traceback.format_exc())


if __name__ == "__main__":
    from mlxtx.engine_process import serve

    serve()
