"""A training run as it is shown: its points, its samples, how it stands."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtx.tui.clean import duration, size

from mlxtx.events import Event, Progress

_KEPT_SAMPLES = 20


@dataclass
class TrainRun:
    """``losses`` and ``validation`` are (step, loss); ``samples`` (step, prompt, text)."""

    model: str
    out: Path
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    samples: list[tuple[int, str, str]] = field(default_factory=list)
    latest: dict[str, Any] = field(default_factory=dict)
    progress: Progress | None = None

    def take(self, event: Event | None) -> None:
        if not isinstance(event, Progress):
            return
        if event.stage == "sample":
            said = (int(event.done), str(event.details["prompt"]), str(event.details["text"]))
            self.samples = [*self.samples, said][-_KEPT_SAMPLES:]
        else:
            self._point(event.stage, int(event.done), event.details)
            if event.stage == "train":
                self.progress = event

    def _point(self, stage: str, step: int, details: dict[str, Any]) -> None:
        points = {"train": self.losses, "validate": self.validation}.get(stage)
        loss = details.get("loss")
        if points is None or not isinstance(loss, (int, float)):
            return
        # A resumed run goes over the steps that its saved state has not seen.
        while points and points[-1][0] >= step:
            points.pop()
        if loss == loss and abs(loss) != float("inf"):
            points.append((step, float(loss)))
        if stage == "train":
            self.latest = details

    def figures(self) -> str:
        """The line under the plot."""
        parts = []
        if self.progress is not None:
            parts.append(f"step {self.progress.done:,.0f}/{self.progress.total:,.0f}")
        if self.losses:
            parts.append(f"loss {self.losses[-1][1]:.3f}")
        if self.validation:
            parts.append(f"validation {self.validation[-1][1]:.3f}")
        if speed := self.latest.get("tokens_per_second"):
            parts.append(f"{speed:,.0f} tok/s")
        if memory := self.latest.get("peak_memory_bytes"):
            parts.append(f"peak {size(memory)}")
        if self.progress is not None and self.progress.seconds_left:
            parts.append(f"{duration(self.progress.seconds_left)} left")
        return " · ".join(parts)


def read_run(model: str, out: Path) -> TrainRun | None:
    """The run that ``out`` holds already, from its metrics; None when there is none."""
    try:
        lines = (out / "metrics.jsonl").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    run = TrainRun(model, out)
    for line in lines:
        try:
            values = json.loads(line)
            run._point(str(values["stage"]), int(values["step"]), values)
        except (ValueError, KeyError, TypeError):
            continue
    return run
