"""Between the engine and the screens: events in portions, and only those somebody still wants.

A model may give a hundred events a second; a terminal is read ten times a second. The bridge joins
what belongs together and hands it over at most ``RATE`` times a second; what ends a job goes at
once. Events of a job that was forgotten (a reply that was stopped, a search that was retyped) are
dropped.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from mlxtx.engine import Convert, Download, Job, Pause, Stop, Train
from mlxtx.events import Delta, Done, Event, Failed, Prefill, Progress, Stats, Warned

RATE = 12.0
# Seconds until a long job that was told to stop is ended with its process. A download only takes
# its half files away; a batch of a training step may take minutes, and its state is worth the wait.
_GRACE_SECONDS: dict[type[Job], float] = {Download: 3.0, Convert: 10.0, Train: 600.0}

Watcher = Callable[[Event], None]
Ended = Callable[[str, str], None]


class EngineLike(Protocol):
    """What the bridge needs of an engine: ``EngineProcess``, or a scripted one in tests."""

    def start(self) -> None: ...
    def submit(self, job: Job, number: int) -> int: ...
    async def close(self, timeout: float = 1.0) -> None: ...
    def kill(self) -> None: ...


EngineFactory = Callable[[Callable[[Event], None], Ended], EngineLike]


def join(events: list[Event]) -> list[Event]:
    """The same story in fewer events: text joined, and only the last of each kind of figure."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if last is not None and type(last) is type(event) and last.job == event.job:
            if isinstance(event, Delta) and isinstance(last, Delta) and last.kind == event.kind:
                out[-1] = replace(last, text=last.text + event.text, token=None, logprob=None)
                continue
            if isinstance(event, (Prefill, Stats)) or (
                isinstance(event, Progress)
                and isinstance(last, Progress)
                and last.stage == event.stage
                # Each training report is a point of the plot.
                and not event.details
            ):
                out[-1] = event
                continue
        out.append(event)
    return out


class Bridge:
    """``deliver(events)`` is called on the event loop, which then calls ``dispatch`` for each.

    The chat has one engine for its life. Questions that must not wait for a reply (a search, a
    memory plan) go to a second one, the desk, which starts with the first question. A long job (a
    download, a conversion, a training run) gets one of its own, so that it can be paused by ending
    it and can't take the chat with it.
    """

    def __init__(
        self,
        deliver: Callable[[list[Event]], None],
        engine_ended: Ended,
        make_engine: EngineFactory,
    ) -> None:
        self._deliver = deliver
        self._make = make_engine
        self._chat = make_engine(self._take, engine_ended)
        self._desk: EngineLike | None = None
        self._asked: set[int] = set()  # what the desk has not answered
        self._long: dict[int, tuple[EngineLike, float]] = {}
        self._numbers = itertools.count(1)
        self._watchers: dict[int, Watcher] = {}
        self._waiting: list[Event] = []
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start the chat's engine before it is needed."""
        self._chat.start()

    def submit(self, job: Job, watcher: Watcher) -> int:
        """Run ``job`` in the chat's engine; ``watcher`` gets its events."""
        number = next(self._numbers)
        self._watchers[number] = watcher
        return self._chat.submit(job, number)

    def ask(self, job: Job, watcher: Watcher) -> int:
        """Run a short ``job`` beside the chat's."""
        number = next(self._numbers)
        self._watchers[number] = watcher
        if self._desk is None:
            self._desk = self._make(self._take, lambda message, detail: None)
        self._asked.add(number)
        return self._desk.submit(job, number)

    def submit_long(self, job: Job, watcher: Watcher) -> int:
        """Run ``job`` in an engine of its own, which ends with it."""
        number = next(self._numbers)
        self._watchers[number] = watcher
        engine = self._make(self._take, lambda message, detail: None)
        self._long[number] = engine, _GRACE_SECONDS.get(type(job), 1.0)
        return engine.submit(job, number)

    def hold(self, number: int, on: bool) -> None:
        """Hold a long job, with all it has in hand, or let it go on."""
        if number in self._long:
            self._long[number][0].submit(Pause(job=number, on=on), next(self._numbers))

    def stop(self, number: int) -> None:
        """Ask for the end of a job; its ``Done`` or ``Failed`` still comes."""
        if number in self._long:
            engine, grace = self._long[number]
            engine.submit(Stop(job=number), next(self._numbers))
            asyncio.get_running_loop().call_later(grace, self._end_long, number)
        else:
            self._chat.submit(Stop(job=number), next(self._numbers))

    def forget(self, number: int) -> None:
        """Drop whatever job ``number`` still says; a question that waits is not asked any more."""
        self._watchers.pop(number, None)
        if number in self._asked and self._desk is not None:
            self._asked.discard(number)
            self._desk.submit(Stop(job=number), next(self._numbers))

    def _end_long(self, number: int) -> None:
        if number in self._long:
            self._long[number][0].kill()

    def _take(self, event: Event) -> None:
        if event.job not in self._watchers and not isinstance(event, Warned):
            return
        self._waiting.append(event)
        loop = asyncio.get_running_loop()
        if isinstance(event, (Done, Failed)):
            self._flush()
            if event.job in self._long:
                engine, _ = self._long.pop(event.job)
                task = asyncio.ensure_future(engine.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        elif self._timer is None:
            wait = max(0.0, self._last + 1 / RATE - loop.time())
            self._timer = loop.call_later(wait, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._last = asyncio.get_running_loop().time()
        events, self._waiting = self._waiting, []
        if events:
            self._deliver(join(events))

    def dispatch(self, event: Event) -> None:
        """Hand ``event`` to whoever submitted its job, unless that was forgotten meanwhile."""
        if watcher := self._watchers.get(event.job):
            if isinstance(event, (Done, Failed)):
                self._asked.discard(event.job)
                self.forget(event.job)
            watcher(event)

    async def restart(self) -> None:
        """End the chat's engine, whatever it does, and start it again."""
        await self._chat.close(timeout=0.2)
        self._chat.start()

    async def close(self) -> None:
        """End every engine."""
        self._watchers.clear()
        short = [engine for engine in (self._chat, self._desk) if engine is not None]
        closing = [engine.close() for engine in short]
        # Leaving the app pauses what runs: it gets the time to save its state.
        closing += [engine.close(timeout=grace) for engine, grace in self._long.values()]
        await asyncio.gather(*closing)
