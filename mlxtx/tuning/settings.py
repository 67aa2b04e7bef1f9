"""How to train: one record of numbers and choices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxtx.errors import MlxtxError
from mlxtx.tuning.objective import NextToken
from mlxtx.tuning.optimizer import OPTIMIZERS, Schedule

_FROM_ZERO = (
    *("learning_rate", "warmup", "final_rate", "weight_decay", "clip", "ahead_weight"),
    *("balance_weight", "seed", "validate_every", "validate_batches", "sample_every", "save_every"),
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How to train. A step sees ``batch_size`` samples ``accumulate`` times.

    clip: the largest norm of all gradients together, 0 for none. warmup: steps. final_rate: the
    last learning rate as a part of the first. validate_batches: at most so many, 0 for all.
    bad_steps: so many steps in a row with a loss or gradient that is not finite stop the run.
    """

    iters: int
    batch_size: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 0
    final_rate: float = 0.1
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    master: bool = True
    clip: float = 1.0
    packing: bool = True
    shuffle: bool = True
    checkpoint: bool = False
    ahead_weight: float = 0.3
    balance_weight: float = 0.0
    seed: int = 0
    report_every: int = 10
    validate_every: int = 0
    validate_batches: int = 0
    sample_every: int = 0
    save_every: int = 100
    keep: int = 2
    bad_steps: int = 3

    def __post_init__(self) -> None:
        for name in ("iters", "batch_size", "accumulate", "report_every", "bad_steps"):
            if getattr(self, name) < 1:
                raise MlxtxError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in _FROM_ZERO:
            if not 0 <= getattr(self, name) < math.inf:
                raise MlxtxError(f"{name} must be a number from 0, not {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise MlxtxError(f"unknown optimizer {self.optimizer!r}: use {', '.join(OPTIMIZERS)}")
        self.learning_schedule()

    def objective(self) -> NextToken:
        return NextToken(self.ahead_weight, self.balance_weight, self.checkpoint)

    def learning_schedule(self) -> Schedule:
        return Schedule(self.learning_rate, self.iters, self.schedule, self.warmup, self.final_rate)


# Settings that a resumed run may change: they do not change what is computed.
FREE_SETTINGS = frozenset(
    (
        "report_every",
        "validate_every",
        "validate_batches",
        "sample_every",
        "save_every",
        "keep",
        "bad_steps",
    )
)
