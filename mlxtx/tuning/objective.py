"""What training makes smaller. ``NextToken`` is the usual one; others can take its place.

An objective is two functions. ``forward`` runs the decoder up to states that the head turns into
logits, and adds up whatever needs no logits; it is differentiated. ``terms`` says which targets
each of those states is to predict, and how much they weigh.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlxtx.decoder.experts import Experts
from mlxtx.tuning.head_loss import head_loss, head_path, wide
from mlxtx.tuning.packing import Batch, packed_arguments
from mlxtx.tuning.trees import named, nested


@dataclass(frozen=True)
class Term:
    """Targets [R, N] for one of the states, where they count, and the weight of their mean loss."""

    targets: mx.array
    scored: np.ndarray
    weight: float = 1.0


class Objective(Protocol):
    def forward(self, model: Any, batch: Batch) -> tuple[list[mx.array], mx.array | None]:
        """States [R, N, D] for each term, and an additional loss (a scalar) or None."""
        ...

    def terms(self, model: Any, batch: Batch) -> list[Term]: ...


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token.

    ahead_weight: the weight of the extra prediction heads' mean loss (DeepSeek-V3 report,
    equation 25). balance_weight: the weight of the experts' balancing loss, averaged over
    layers. checkpoint: compute each block again in the backward pass instead of keeping it.
    """

    ahead_weight: float = 0.3
    balance_weight: float = 0.0
    checkpoint: bool = False

    def forward(self, model, batch):
        with _hooked(model, self) as balances:
            config = model.config
            state = model.hidden(batch.tokens, **packed_arguments(config.blocks, batch))
            states = [state]
            ahead = packed_arguments(config.prediction_heads, batch)
            for depth in range(len(self.terms(model, batch)) - 1):
                state = model.predict_ahead(state, batch.targets[depth], depth=depth, **ahead)[1]
                states.append(state)
        if not balances:
            return states, None
        return states, self.balance_weight * sum(balances) / len(balances)

    def terms(self, model, batch):
        main = Term(batch.targets[0], batch.scored[0])
        heads = len(model.config.prediction_heads) if self.ahead_weight else 0
        return [main] + [
            Term(batch.targets[d + 1], batch.scored[d + 1], self.ahead_weight / heads)
            for d in range(heads)
        ]


class _Hook:
    """Stands in for a block during one forward pass: checkpoints it and takes its balancing loss."""

    def __init__(
        self, block: Any, checkpoint: bool, balances: list[mx.array], balance: bool, seed: int
    ):
        self.block, self.checkpoint, self.balances = block, checkpoint, balances
        self.seed = seed
        self.balance = balance and isinstance(block.mlp, Experts)

    def __call__(self, x: mx.array, *rest: Any) -> mx.array:
        def run(weights, x):
            if self.checkpoint:  # the second time dropout has to draw what it drew the first time
                mx.random.seed(self.seed)
            self.block.update(weights)
            if not self.balance:
                return self.block(x, *rest), None
            with _tapped(self.block.mlp) as inputs:
                return self.block(x, *rest), self.block.mlp.balancing_loss(inputs[0])

        weights = self.block.trainable_parameters()
        call = mx.checkpoint(run) if self.checkpoint else run
        y, balance = call(weights, x)
        self.block.update(weights)
        if balance is not None:
            self.balances.append(balance)
        return y


class _TappedExperts(Experts):
    def __call__(self, x, scored=None):
        self._inputs.append(x if scored is None else scored)
        return Experts.__call__(self, x, scored)


@contextmanager
def _tapped(experts: Experts) -> Iterator[list[mx.array]]:
    """The inputs that the layer sees inside the block."""
    inputs: list[mx.array] = []
    kind = type(experts)
    experts.__class__ = _TappedExperts
    experts._inputs = inputs
    try:
        yield inputs
    finally:
        experts.__class__ = kind
        del experts._inputs


@contextmanager
def _hooked(model: Any, objective: NextToken) -> Iterator[list[mx.array]]:
    balances: list[mx.array] = []
    checkpoint, balance = objective.checkpoint, objective.balance_weight > 0
    if not (checkpoint or balance):
        yield balances
        return
    blocks = model.model.layers
    seed = int(mx.random.randint(0, 2**31 - 1 - len(blocks), ())) if checkpoint else 0
    # Keys that a later block reads from the cache would leave a checkpoint behind its back.
    sources = [getattr(b.attention, "shares_cache_of", None) for b in model.config.blocks]
    model.model.layers = [
        _Hook(
            block,
            checkpoint and source is None and n not in sources,
            balances,
            balance,
            seed + n,
        )
        for n, (block, source) in enumerate(zip(blocks, sources, strict=True))
    ]
    try:
        yield balances
    finally:
        model.model.layers = blocks


@dataclass
class StepLoss:
    """Summed loss and count of the main term's targets; the other terms' part of the loss."""

    total: float
    count: int
    extra: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)


def loss_and_gradients(
    model: Any, batch: Batch, objective: Objective, counts: list[int] | None = None
) -> tuple[StepLoss, dict[str, mx.array]]:
    """The loss of a batch and the gradients of all trainable weights, by name, evaluated.

    counts: the targets of each term over all batches of the step, when gradients are
    accumulated; the gradients of those batches then add up to the gradient of the mean.
    """
    trained = named(model.trainable_parameters())
    head = head_path(model) + "."
    only_head = {} if model.config.head.tied else {k for k in trained if k.startswith(head)}
    names = [name for name in trained if name not in only_head]
    terms = objective.terms(model, batch)
    counts = counts or [len(term.scored) for term in terms]
    has_extra = []

    def forward(*weights):
        model.update(nested(dict(zip(names, weights, strict=True))))
        states, extra = objective.forward(model, batch)
        has_extra.append(extra is not None)
        return [*map(wide, states), mx.zeros(()) if extra is None else extra]

    width = model.config.embedding.width or model.config.width
    share = len(terms[0].scored) / max(counts[0], 1)
    # The backward graph is built around gradients of the states that are still zeros; the
    # states are evaluated, the head writes its gradients into those very buffers, and only
    # then is the backward graph evaluated. So the head may evaluate chunk by chunk.
    double = any(w.dtype == mx.float64 for w in trained.values())
    dtype = mx.float64 if double else mx.float32
    cotangents = [_writable_zeros((*batch.tokens.shape, width), dtype) for _ in terms]
    mx.eval(cotangents)
    try:
        outputs, gradients = mx.vjp(
            forward, [trained[n] for n in names], [*cotangents, mx.array(share)]
        )
    finally:
        model.update(nested(trained))
    mx.eval(outputs)
    loss = StepLoss(0.0, 0)
    head_gradients: dict[str, mx.array] = {}
    for n, (term, state, cotangent) in enumerate(zip(terms, outputs, cotangents, strict=False)):
        buffer = np.array(cotangent, copy=False)
        buffer.shape = (-1, width)  # unlike reshape this never copies
        scale = term.weight / max(counts[n], 1)
        part = head_loss(model, state, term.targets, term.scored, scale=scale, gradient=buffer)
        if n == 0:
            loss.total, loss.count = part.total, part.count
        else:
            loss.extra += part.total * scale
        for name, value in named(part.head, head_path(model)).items():
            old = head_gradients.get(name)
            head_gradients[name] = value if old is None else old + value
    if has_extra[0]:
        loss.extra += float(outputs[-1]) * share
    del outputs, cotangents
    result = dict(zip(names, gradients, strict=True))
    for name, value in head_gradients.items():
        result[name] = result[name] + value if name in result else value
    mx.eval(result)
    return loss, {name: result[name] for name in trained}


def _writable_zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Zeros with a buffer of their own, row after row."""
    kind = np.float64 if dtype == mx.float64 else np.float32
    return mx.array(np.zeros(shape, kind), dtype=dtype)


def evaluate_batch(model: Any, batch: Batch, count_correct: bool = False):
    """Loss of the next token over a batch, without gradients."""
    arguments = packed_arguments(model.config.blocks, batch)
    state = model.hidden(batch.tokens, **arguments)
    mx.eval(state)
    return head_loss(model, state, batch.targets[0], batch.scored[0], count_correct=count_correct)


def add_gradients(total: dict | None, more: dict) -> dict:
    return more if total is None else tree_map(lambda a, b: a + b, total, more)
