"""The state of a training run on disk: one file a saved step, written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx

from mlxtx.errors import MlxtxError
from mlxtx.files import atomic_write

_NAME = re.compile(r"step-(\d+)\.safetensors")


@dataclass
class RunState:
    """Everything a run needs to go on: the number of finished ``step``s (from which the data
    position, the schedule and the random numbers follow), weights, optimizer, and ``facts``."""

    step: int
    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    facts: dict[str, Any]


def save_arrays(path: Path, arrays: Mapping[str, mx.array], facts: Mapping[str, Any]) -> None:
    """A safetensors file; ``facts`` go to its metadata as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "mlx", "facts": json.dumps(facts)}
    with atomic_write(path) as file:
        mx.save_safetensors(cast(BinaryIO, file), dict(arrays), metadata)


class StateFolder:
    """The newest ``keep`` states of a run."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, max(keep, 1)

    def steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(p.name) for p in self.folder.iterdir())
        return sorted(int(m[1]) for m in found if m)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def save(self, state: RunState) -> None:
        arrays = {f"weights/{n}": a for n, a in state.weights.items()}
        arrays |= {f"optimizer/{n}": a for n, a in state.optimizer.items()}
        save_arrays(self.path(state.step), arrays, {**state.facts, "step": state.step})
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)

    def load(self) -> RunState | None:
        """The newest state, or None when there is none."""
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        try:
            arrays, metadata = cast(Any, mx.load(str(path), return_metadata=True))
            facts = json.loads(metadata["facts"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise MlxtxError(
                f"{path} can't be read ({error}): delete it to use an older one"
            ) from None
        parts: dict[str, dict[str, mx.array]] = {"weights": {}, "optimizer": {}}
        for name, array in arrays.items():
            part, rest = name.split("/", 1)
            parts[part][rest] = array
        return RunState(facts.pop("step"), parts["weights"], parts["optimizer"], facts)
