"""An engine that plays a script, and helpers to drive the app with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxtx.tui.app import MlxtxApp

from mlxtx.engine import Count, Download, Generate, Job, Load, Pause, Stop
from mlxtx.events import Delta, Done, Event, Failed, Loaded, Prefill, Stats

# What a script yields: an event, or something to wait for: seconds, or a gate a test opens.
Play = Iterable[Event | float | asyncio.Event]


def loaded(job: Job) -> Play:
    assert isinstance(job, Load)
    yield Loaded(
        model=job.model,
        seconds=0.1,
        bytes=3_200_000,
        context=4096,
        details={"memory_limit": 12_000_000_000},
    )
    yield Done(reason="done")


def reply(
    *parts: str | float | asyncio.Event, thinking: str = "", reason: str = "stop"
) -> Callable[[Job], Play]:
    """A reply in ``parts``; numbers and gates are pauses."""

    def play(job: Job) -> Play:
        yield Prefill(done=20, total=20, seconds=0.1)
        if thinking:
            yield Delta(text=thinking, kind="thinking")
        count = 0
        for part in parts:
            if isinstance(part, str):
                count += 1
                yield Delta(text=part)
            else:
                yield part
        yield Done(
            reason=reason,
            stats=Stats(
                prompt_tokens=20,
                generated_tokens=count,
                time_to_first_token=0.3,
                decode_tokens_per_second=42.0,
                cache_bytes=1_500_000,
                memory_bytes=4_700_000,
            ),
        )

    return play


def fails(message: str) -> Callable[[Job], Play]:
    return lambda job: [Failed(message=message, detail="Traceback ...")]


class Script:
    """``Script()(deliver, ended)`` makes an engine. ``answers`` maps a kind of job to its play;
    ``jobs`` collects what was submitted, ``engines`` the engines."""

    def __init__(self, **answers: Callable[[Job], Play]) -> None:
        self.answers: dict[str, Callable[[Job], Play]] = {
            "Load": loaded,
            "Generate": reply("Hello ", "**there**."),
            "Count": lambda job: [Done(reason="done", details={"tokens": len(job.text) // 3})],  # type: ignore[attr-defined]
            **answers,
        }
        self.jobs: list[Job] = []
        self.engines: list[ScriptedEngine] = []

    def __call__(
        self, deliver: Callable[[Event], None], ended: Callable[[str, str], None]
    ) -> ScriptedEngine:
        self.engines.append(ScriptedEngine(self, deliver, ended))
        return self.engines[-1]

    def submitted(self, kind: type) -> list[Any]:
        return [job for job in self.jobs if isinstance(job, kind)]


class ScriptedEngine:
    """Plays one job after another, as the real one does."""

    def __init__(
        self,
        script: Script,
        deliver: Callable[[Event], None],
        ended: Callable[[str, str], None],
    ) -> None:
        self.script, self.deliver, self.ended = script, deliver, ended
        self.stopped: set[int] = set()
        self.killed = self.held = False
        self._waiting: asyncio.Queue[tuple[int, Job]] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None or self._task.done():
            self._waiting = asyncio.Queue()
            self._task = asyncio.create_task(self._work(self._waiting))

    def submit(self, job: Job, number: int) -> int:
        self.start()
        self.script.jobs.append(job)
        if isinstance(job, Stop):
            self.stopped.add(job.job)
        elif isinstance(job, Pause):
            self.held = job.on
        else:
            assert self._waiting is not None
            self._waiting.put_nowait((number, job))
        return number

    async def _work(self, waiting: asyncio.Queue[tuple[int, Job]]) -> None:
        while True:
            number, job = await waiting.get()
            await self._play(number, job)

    async def _play(self, number: int, job: Job) -> None:
        for step in self.script.answers[type(job).__name__](job):
            while self.held:
                await asyncio.sleep(0.005)
            if isinstance(step, Event):
                self.deliver(replace(step, job=number))
                await asyncio.sleep(0)
            elif isinstance(step, asyncio.Event):
                while (self.held or not step.is_set()) and number not in self.stopped:
                    await asyncio.sleep(0.005)
            else:
                await asyncio.sleep(step)
            if number in self.stopped:
                self.deliver(Done(job=number, reason="stopped"))
                return

    def die(self, message: str = "The engine ended by itself (signal SIGABRT).") -> None:
        """End as a process does that ran out of memory."""
        assert self._task is not None
        self._task.cancel()
        self._task = None
        self.ended(message, "libc++abi: terminating")

    async def close(self, timeout: float = 1.0) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def kill(self) -> None:
        self.killed = True


def make_app(
    folder: Path, script: Script | None = None, *, make_engine: Any = None, **options: Any
) -> MlxtxApp:
    """The app with its files in ``folder`` and a scripted engine, or ``make_engine``."""
    return MlxtxApp(
        make_engine=make_engine or script or Script(),
        store_path=folder / "chats.db",
        settings_path=folder / "settings.toml",
        **options,
    )


async def until(true: Callable[[], Any], seconds: float = 120.0) -> None:
    """Let the event loop run until ``true()``; fails after ``seconds``."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not true():
        assert loop.time() < end, "it did not come in time"
        await asyncio.sleep(0.01)


async def wait_until(pilot: Any, true: Callable[[], Any], seconds: float = 120.0) -> None:
    """Let the app run until ``true()``; fails after ``seconds``."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not true():
        assert loop.time() < end, "the app did not get there in time"
        await pilot.pause(0.01)
    await pilot.pause()


async def send(pilot: Any, text: str) -> None:
    """Write ``text`` in the input and press Enter."""
    pilot.app.chat.composer.fill(text)
    await pilot.press("enter")


async def ask(pilot: Any, text: str) -> None:
    """Send ``text`` and wait for the whole reply."""
    app = pilot.app
    before = len(app.chat.conversation.path())
    await send(pilot, text)
    await wait_until(
        pilot,
        lambda: app.chat.reply is None and len(app.chat.conversation.path()) == before + 2,
    )


def screen_text(app: MlxtxApp) -> str:
    """What a person reads on the screen, row by row."""
    strips = app.screen._compositor.render_strips(app.size)
    return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in strips)


def toasts(app: MlxtxApp) -> list[str]:
    """The notices that were shown and are not yet gone."""
    return [notice.message for notice in app._notifications]


__all__ = [
    "Count", "Download", "Generate", "Script", "ScriptedEngine", "ask", "fails", "loaded",
    "make_app", "reply", "screen_text", "send", "toasts", "until", "wait_until",
]  # fmt: skip
