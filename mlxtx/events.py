"""What long work says while it runs: small frozen events that the CLI and the app render.

``job`` is the number of the job that an event belongs to, so that a reader can drop what
is stale. Library calls that run one job at a time leave it 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    job: int = 0


@dataclass(frozen=True, kw_only=True)
class Loaded(Event):
    """A model is ready. ``bytes`` is what its weights hold in memory, ``context`` its tokens."""

    model: str
    seconds: float
    bytes: int
    context: int | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prefill(Event):
    """``done`` of ``total`` prompt tokens are in the cache after ``seconds``."""

    done: int
    total: int
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Delta(Event):
    """New text that is safe to show. ``kind`` is "text" or "thinking"."""

    text: str
    kind: str = "text"
    token: int | None = None
    logprob: float | None = None


@dataclass(frozen=True, kw_only=True)
class Stats(Event):
    """Figures of one generation. Times in seconds, speeds in tokens a second, memory in bytes."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    time_to_first_token: float = 0.0
    prefill_tokens_per_second: float = 0.0
    decode_tokens_per_second: float = 0.0
    cache_bytes: int = 0
    memory_bytes: int = 0
    peak_memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Progress(Event):
    """``done`` of ``total`` units of a long job (bytes converted, steps trained ...)."""

    stage: str
    done: float
    total: float
    unit: str = ""
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float | None:
        if self.done <= 0 or self.seconds <= 0:
            return None
        return self.seconds * (self.total - self.done) / self.done


@dataclass(frozen=True, kw_only=True)
class Done(Event):
    """The job ended. ``reason``: "stop" (end token), "stop_string", "length", "stopped", "done"."""

    reason: str
    stats: Stats | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The job failed: one line for people, ``detail`` (a traceback) for --debug."""

    message: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something to know while work goes on; it belongs to no job."""

    message: str
