"""Which model answers, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class ModelState:
    """Which model answers. ``state``: "none", "loading", "ready", "failed" or "dead"."""

    name: str = "bundled"
    adapter: str = ""
    kv: str = ""
    state: str = "none"
    context: int | None = None
    memory: int = 0
    memory_limit: int | None = None
    # Why there is none, when the state is "failed" or "dead".
    problem: str = ""
    # How its makers would sample; what a person has chosen goes before it.
    sampling: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        short = self.name.rstrip("/").rsplit("/", 1)[-1]
        return f"{short} + {Path(self.adapter).name}" if self.adapter else short
