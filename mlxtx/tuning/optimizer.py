"""Optimizers over named weights, and the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers

from mlxtx.errors import MlxtxError

# name -> the optimizer of mlx.optimizers and its settings
_KINDS: dict[str, tuple[Callable[..., optimizers.Optimizer], dict[str, Any]]] = {
    "adamw": (optimizers.AdamW, {"bias_correction": True}),
    "adam": (optimizers.Adam, {"bias_correction": True}),
    "adafactor": (optimizers.Adafactor, {"relative_step": False, "scale_parameter": False}),
    "lion": (optimizers.Lion, {}),
    "muon": (optimizers.Muon, {}),
    "sgd": (optimizers.SGD, {}),
}
OPTIMIZERS = tuple(_KINDS)
SCHEDULES = ("constant", "linear", "cosine")
_NO_DECAY = ("adam", "sgd")  # the weight decay of these is not decoupled
MUON_REST_RATE = 0.1  # Muon's steps are normalised, so its rate is larger than AdamW's


@dataclass(frozen=True)
class Schedule:
    """``warmup`` steps that rise linearly to ``rate``, then constant, linear or cosine down to
    ``final`` times ``rate`` at step ``total``."""

    rate: float
    total: int
    kind: str = "constant"
    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise MlxtxError(f"unknown schedule {self.kind!r}: use {', '.join(SCHEDULES)}")

    def __call__(self, step: int) -> float:
        """The learning rate of step ``step``, from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.rate
        part = (step - self.warmup) / max(self.total - self.warmup, 1)
        part = min(part, 1.0)
        down = 1 - part if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * part))
        return self.rate * (self.final + (1 - self.final) * down)


@dataclass
class _Group:
    optimizer: optimizers.Optimizer
    names: list[str]
    rate: float = 1.0  # times the learning rate


@dataclass
class Optimizer:
    """One of ``mlx.optimizers`` over a flat dictionary of weights.

    Vectors (norms, biases) are not decayed. Muon takes matrices of the blocks; embeddings, the
    head and everything else go to AdamW. With ``master`` half-precision weights are updated in
    float32 copies, so that small steps are not lost.
    """

    kind: str
    weight_decay: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    master: bool = True

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise MlxtxError(f"unknown optimizer {self.kind!r}: use {', '.join(OPTIMIZERS)}")
        self._groups: list[_Group] = []
        self._masters: dict[str, mx.array] = {}

    def start(self, weights: Mapping[str, mx.array]) -> None:
        """Makes the groups for these weights."""
        half = {n: w for n, w in weights.items() if w.dtype in (mx.float16, mx.bfloat16)}
        self._masters = {n: w.astype(mx.float32) for n, w in half.items()} if self.master else {}
        matrices = [n for n, w in weights.items() if w.ndim >= 2]
        vectors = [n for n, w in weights.items() if w.ndim < 2]
        if self.kind == "muon":
            inner = [n for n in matrices if weights[n].ndim == 2 and ".layers." in n]
            outer = [n for n in matrices if n not in set(inner)]
            self._add("muon", inner, self.weight_decay, 1.0)
            self._add("adamw", outer, self.weight_decay, MUON_REST_RATE)
            self._add("adamw", vectors, 0.0, MUON_REST_RATE)
        else:
            self._add(self.kind, matrices, self.weight_decay, 1.0)
            self._add(self.kind, vectors, 0.0, 1.0)

    def _add(self, kind: str, names: list[str], decay: float, rate: float) -> None:
        if not names:
            return
        make, settings = _KINDS[kind]
        settings = dict(settings)
        if kind not in _NO_DECAY:
            settings["weight_decay"] = decay
        if kind == self.kind:
            settings |= self.options
        self._groups.append(_Group(make(learning_rate=0.0, **settings), names, rate))

    def apply(
        self, weights: Mapping[str, mx.array], gradients: Mapping[str, mx.array], rate: float
    ) -> dict[str, mx.array]:
        """New weights after one step, lazy like the state."""
        full = {n: self._masters.get(n, w) for n, w in weights.items()}
        new: dict[str, mx.array] = {}
        for group in self._groups:
            group.optimizer.learning_rate = rate * group.rate
            part = {n: gradients[n].astype(full[n].dtype) for n in group.names}
            new |= group.optimizer.apply_gradients(part, {n: full[n] for n in group.names})
        for name in self._masters:
            self._masters[name] = new[name]
        return {n: new[n].astype(w.dtype) for n, w in weights.items()}

    def state(self) -> dict[str, mx.array]:
        """All arrays by name; what ``restore`` takes."""
        arrays = {f"master/{n}": a for n, a in self._masters.items()}
        for number, group in enumerate(self._groups):
            for name, value in group.optimizer.state.items():
                slots = value if isinstance(value, dict) else {"": value}
                arrays |= {f"{number}/{name}/{slot}": a for slot, a in slots.items()}
        return arrays

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        for group in self._groups:
            group.optimizer.state = {}
        for key, array in arrays.items():
            first, rest = key.split("/", 1)
            if first == "master":
                self._masters[rest] = array
                continue
            name, slot = rest.rsplit("/", 1)
            state = self._groups[int(first)].optimizer.state
            if slot:
                state.setdefault(name, {})[slot] = array
            else:
                state[name] = array
