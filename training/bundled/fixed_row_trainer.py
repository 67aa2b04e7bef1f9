"""The project's trainer with its step compiled as a whole, for rows of one fixed length.

A small model on a CPU spends much of a step on launching small operations; compiled, a step of
the bundled model takes about half the time. MLX computes each stream of a CPU in one thread, so
the rows of a step are split over two streams, whose gradients are added: on two cores a quarter
more tokens a second than with a BLAS of two threads. State, resume, schedule, optimizer, reports
and saving are the trainer's own.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxtx.tuning.objective import StepLoss
from mlxtx.tuning.trainer import Trainer
from training.bundled.rows import FixedRows

PLACES = 256
PARTS = 2  # of a step, computed side by side


class FixedRowTrainer(Trainer):
    """Trains on ``FixedRows``. One step is ``batch_size`` rows."""

    samples: FixedRows
    distance = 1  # how many tokens ahead a state predicts
    _compiled: Any = None

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.streams = [mx.new_stream(mx.default_device()) for _ in range(PARTS)]

    def _parts(self, picked: list[int]) -> list[dict[str, mx.array]]:
        """The rows of a step, dealt to the streams."""
        dealt = [picked[n::PARTS] for n in range(min(PARTS, len(picked)))]
        counts = [self._counted(rows) for rows in dealt]
        # as many as a multiple of 256, so that few shapes are traced; the filling counts nothing
        most = max(np.count_nonzero(count) for count in counts)
        size = -(-most // PLACES) * PLACES
        return [self._rows(rows, count, size) for rows, count in zip(dealt, counts, strict=True)]

    def _counted(self, picked: list[int]) -> np.ndarray:
        """What each token of these rows counts in the loss."""
        rows, ahead = self.samples, self.distance
        segments = rows.segments[picked]
        return rows.weights[picked][:, ahead:] * (segments[:, ahead:] == segments[:, :-ahead])

    def _rows(self, picked: list[int], counts: np.ndarray, size: int) -> dict[str, mx.array]:
        rows, ahead = self.samples, self.distance
        tokens, segments = rows.tokens[picked], rows.segments[picked]
        places = np.flatnonzero(counts)
        filled = np.zeros(size, np.int32)
        filled[: len(places)] = places
        weights = np.zeros(len(filled), np.float32)
        weights[: len(places)] = counts.reshape(-1)[places]
        return {
            "tokens": mx.array(tokens[:, :-ahead]),  # [B, T]
            "next": mx.array(tokens[:, 1 : tokens.shape[1] - ahead + 1]),  # [B, T]
            "segments": mx.array(segments[:, :-ahead]),
            "positions": mx.array(rows.positions[picked][:, :-ahead]),
            "places": mx.array(filled),  # [P] into the flat batch
            "targets": mx.array(tokens[:, ahead:].reshape(-1)[filled]),  # [P]
            "weights": mx.array(weights),  # [P]
        }

    def _states(self, batch: dict[str, mx.array]) -> mx.array:
        return self.model.hidden(
            batch["tokens"], segments=batch["segments"], positions=batch["positions"]
        )

    def _step(self, weights, state, rate, parts):
        """New weights and optimizer state, the summed loss, and the norm of the gradients."""
        names = list(weights)
        values = [weights[name] for name in names]
        count = sum(part["weights"].sum() for part in parts)

        def loss(part, *values):
            self.model.update(tree_unflatten(list(zip(names, values, strict=True))))
            hidden = self._states(part)  # [B, T, D]
            logits = self.model.head(hidden.flatten(0, 1)[part["places"]])  # [P, V]
            picked = mx.take_along_axis(logits, part["targets"][:, None], axis=-1)[:, 0]
            losses = mx.logsumexp(logits, axis=-1) - picked
            told = (losses * (part["weights"] > 0)).sum()
            return (losses * part["weights"]).sum() / count, told

        slopes = mx.value_and_grad(loss, argnums=list(range(1, len(names) + 1)))
        found = []
        for part, stream in zip(parts, self.streams, strict=False):
            with mx.stream(stream):
                found.append(slopes(part, *values))
        total = sum(told for (_, told), _ in found)
        gradients = [sum(shares) for shares in zip(*(share for _, share in found), strict=True)]
        norm = mx.sqrt(sum(mx.square(g).sum() for g in gradients))
        scale = mx.minimum(1.0, self.settings.clip / norm) if self.settings.clip else mx.array(1.0)
        self.optimizer.restore(state)
        new = self.optimizer.apply(
            weights, {n: g * scale for n, g in zip(names, gradients, strict=True)}, rate
        )
        return new, self.optimizer.state(), total, norm

    def _train_step(self) -> tuple[StepLoss, int]:
        picked = self.order.step(self.step)
        parts = self._parts(picked)
        weights, state = self.weights(), self.optimizer.state()
        if self._compiled is None:
            self._compiled = mx.compile(self._step)
        rate = mx.array(self.schedule(self.step))
        new, new_state, total, norm = self._compiled(weights, state, rate, parts)
        mx.eval(new, new_state, total, norm)
        finite = math.isfinite(total.item()) and math.isfinite(norm.item())
        # tracing left its own arrays in the model and the optimizer
        self.model.update(tree_unflatten(list((new if finite else weights).items())))
        self.optimizer.restore(new_state if finite else state)
        if finite:
            self.bad = 0
        else:
            self._skip()
        count = int((self.samples.segments[picked] > 0).sum())
        self.tokens += count
        self.step += 1
        self._good = self._snapshot()
        return StepLoss(total.item(), int((self._counted(picked) > 0).sum())), count


class AheadTrainer(FixedRowTrainer):
    """Trains the extra head for the token after next beside a decoder that stays as it is: what
    the decoder says is not touched, and its backward pass is saved."""

    distance = 2

    def __init__(self, model: Any, *arguments: Any, **named: Any):
        model.freeze()
        model.prediction_heads[0].unfreeze()
        super().__init__(model, *arguments, **named)

    def _states(self, batch: dict[str, mx.array]) -> mx.array:
        packed = {name: batch[name] for name in ("segments", "positions")}
        hidden = mx.stop_gradient(self.model.hidden(batch["tokens"], **packed))
        return self.model.predict_ahead(hidden, batch["next"], **packed)[1]


def parameter_count(model: Any) -> int:
    return sum(value.size for _, value in tree_flatten(model.parameters()))
