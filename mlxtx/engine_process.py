"""The engine as a child process: JSON lines over pipes, the same jobs and events.

The child keeps the real standard output for events and sends what any library prints to standard
error. It ends when its standard input closes, however the app died; only a training run that still
saves its state outlives it for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from mlxtx import engine, events
from mlxtx.engine import Engine, Job, Shutdown
from mlxtx.errors import MlxtxWarning
from mlxtx.events import Event, Failed, Stats, Warned

_JOBS = {cls.__name__: cls for cls in Job.__subclasses__()}
_EVENTS = {cls.__name__: cls for cls in Event.__subclasses__()}
# A pasted megabyte is one line on the pipe.
_LINE_LIMIT = 256 * 2**20
# What a job may still take when its engine is closed, or when the app is gone: the batch of a
# training step that it is at, and saving the state.
_LAST_SECONDS = 600.0


def encode_job(number: int, job: Job) -> bytes:
    return _line({"number": number, "type": type(job).__name__, **_fields(job)})


def decode_job(line: bytes) -> tuple[int, Job]:
    values = json.loads(line)
    return values.pop("number"), _JOBS[values.pop("type")](**values)


def encode_event(event: Event) -> bytes:
    return _line({"type": type(event).__name__, **_fields(event)})


def decode_event(line: bytes) -> Event:
    values = json.loads(line)
    cls = _EVENTS[values.pop("type")]
    if values.get("stats") is not None:
        values["stats"] = Stats(**values["stats"])
    return cls(**values)


def _fields(item: Any) -> dict[str, Any]:
    return {
        f.name: dataclasses.asdict(value) if isinstance(value, Stats) else value
        for f in dataclasses.fields(item)
        if (value := getattr(item, f.name)) is not None
    }


def _line(values: dict[str, Any]) -> bytes:
    # ASCII only: half a surrogate pair from a model then travels instead of failing to encode.
    return json.dumps(values, separators=(",", ":"), default=str).encode("ascii") + b"\n"


def serve() -> None:
    """The child: jobs from standard input, events to standard output, until the input ends."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    lock = threading.Lock()

    def emit(event: Event) -> None:
        # An app that is gone hears nothing, but its training run still has a state to save: what
        # ends us is the end of standard input.
        with contextlib.suppress(BrokenPipeError), lock:
            out.write(encode_event(event))

    print_warning = warnings.showwarning

    def show_warning(
        message: Warning | str, category: type[Warning], *place: Any, **more: Any
    ) -> None:
        if issubclass(category, MlxtxWarning):
            emit(Warned(message=str(message)))
        else:
            print_warning(message, category, *place, **more)

    warnings.showwarning = show_warning
    owner = Engine(emit)
    for line in sys.stdin.buffer:
        number, job = decode_job(line)
        owner.submit(job, number)
        if isinstance(job, Shutdown):
            break
    # A training run saves its state first; what does not look at its flag must not keep us.
    owner.close(timeout=_LAST_SECONDS)
    os._exit(0)


class EngineProcess:
    """The parent's side, for an asyncio program.

    ``deliver(event)`` is called for every event, in order, on the event loop. When the process
    ends by itself, each job that was not finished gets a ``Failed`` and then
    ``ended(message, detail)`` is called; ``start`` may be called again afterwards.
    """

    command: Sequence[str] = (sys.executable, "-m", "mlxtx.engine")

    def __init__(
        self,
        deliver: Callable[[Event], None],
        ended: Callable[[str, str], None] = lambda message, detail: None,
    ) -> None:
        self._deliver = deliver
        self._ended = ended
        self._numbers = itertools.count(1)
        self._open: set[int] = set()
        self._unsent: list[bytes] = []
        self._errors: deque[str] = deque(maxlen=60)
        self._process: asyncio.subprocess.Process | None = None
        self._starting: asyncio.Task[None] | None = None
        self._readers: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def start(self) -> None:
        """Start the child in the background; jobs may be submitted at once."""
        if self._starting is None:
            self._closing = False
            self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        # A session of its own: Ctrl-C in the terminal belongs to the app.
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=_LINE_LIMIT,
            )
        except OSError as error:
            self._starting = None
            self._unsent.clear()
            self._report_end(f"The engine can't be started: {error.strerror or error}.")
            return
        self._readers = asyncio.create_task(self._read(self._process))
        self._send(b"".join(self._unsent))
        self._unsent.clear()

    def submit(self, job: Job, number: int | None = None) -> int:
        """Send ``job``; its number comes back in every event."""
        self.start()
        number = next(self._numbers) if number is None else number
        line = encode_job(number, job)
        if not isinstance(job, (engine.Stop, engine.Pause, Shutdown)):
            self._open.add(number)
        if self._process is None:
            self._unsent.append(line)
        else:
            self._send(line)
        return number

    def _send(self, data: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            # A child that has just died is told by _read, not by the pipe.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, RuntimeError):
                self._process.stdin.write(data)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None and process.stderr is not None
        errors = asyncio.create_task(self._read_errors(process.stderr))
        async for line in process.stdout:
            event = decode_event(line)
            if isinstance(event, (events.Done, events.Failed)):
                self._open.discard(event.job)
            self._deliver(event)
        code = await process.wait()
        await errors
        self._process = self._starting = None
        if not self._closing:
            self._report_end(self._why(code))

    async def _read_errors(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            self._errors.append(line.decode("utf-8", "replace").rstrip())

    def _why(self, code: int) -> str:
        reason = _signal_name(code) if code < 0 else f"exit code {code}"
        message = f"The engine ended by itself ({reason})."
        if code == -signal.SIGABRT or any("emory" in line for line in self._errors):
            message += " It probably ran out of memory: try a smaller model, context or cache."
        return message

    def _report_end(self, message: str) -> None:
        detail = "\n".join(self._errors)
        for number in sorted(self._open):
            self._deliver(Failed(job=number, message=message, detail=detail))
        self._open.clear()
        self._errors.clear()
        self._ended(message, detail)

    async def close(self, timeout: float = 1.0) -> None:
        """Ask the child to end; after ``timeout`` seconds it is killed."""
        self._closing = True
        if self._starting is not None:
            await self._starting
        process = self._process
        if process is None:
            return
        self._send(encode_job(0, Shutdown()))
        try:
            await asyncio.wait_for(process.wait(), timeout)
        except TimeoutError:
            self.kill()
            await process.wait()
        if self._readers is not None:
            await self._readers
        self._open.clear()

    def kill(self) -> None:
        """End the child at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _signal_name(code: int) -> str:
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
