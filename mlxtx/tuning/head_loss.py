"""Cross-entropy of a model's head, a chunk of positions at a time, with its gradients.

The logits of all positions never exist at once. A lazy graph would keep the chunks of a loop
alive together, so each chunk's loss and gradients are computed and evaluated before the next
one starts. The gradients that leave here (of the hidden states and of the head's own weights)
are complete: nothing is computed again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

CHUNK_LOGITS = 1 << 22  # logits in a chunk: 16 MiB in float32


def wide(x: mx.array) -> mx.array:
    """In the precision of losses: float32, or float64 when it is that already."""
    return x if x.dtype == mx.float64 else x.astype(mx.float32)


@mx.custom_function
def cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """-log softmax(logits)[target], summed over rows, and the softmax: [N, V], [N] -> (), [N, V].

    One pass of exponentials serves both, for they are most of the work: the largest probability
    is 1 / sum(exp(logits - max)), which gives the logarithm of the sum.
    """
    probabilities = mx.softmax(logits, axis=-1)
    total = logits.max(axis=-1) - mx.log(probabilities.max(axis=-1))
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (total - picked).sum(), probabilities


@cross_entropy.vjp
def _cross_entropy_vjp(primals, cotangents, outputs):
    logits, targets = primals
    # softmax - one_hot; the comparison is cheaper than scattering into the probabilities.
    hit = mx.arange(logits.shape[-1])[None] == targets[:, None]
    return (outputs[1] - hit) * cotangents[0], mx.zeros_like(targets)


@dataclass
class HeadLoss:
    """``total``: the summed loss of ``count`` targets, of which ``correct`` had the highest logit.

    ``head``: gradients of the head's trainable weights (a tree), {} when none is trained.
    """

    total: float = 0.0
    count: int = 0
    correct: int = 0
    head: Any = field(default_factory=dict)


def head_path(model: Any) -> str:
    """Where the weights that make logits lie in the model."""
    return "model.embed_tokens" if model.config.head.tied else "lm_head"


def head_module(model: Any) -> nn.Module:
    return model.model.embed_tokens if model.config.head.tied else model.lm_head


def chunk_rows(vocabulary: int) -> int:
    return max(8, CHUNK_LOGITS // vocabulary // 8 * 8)


def head_loss(
    model: Any,
    hidden: mx.array,
    targets: mx.array,
    scored: np.ndarray,
    *,
    scale: float = 1.0,
    gradient: np.ndarray | None = None,
    count_correct: bool = False,
) -> HeadLoss:
    """The loss at the places ``scored`` of hidden [R, N, D] and targets [R, N].

    gradient: an array [R * N, D] of zeros, float32 or as wide as ``hidden``, that is filled with the gradient of
    ``scale`` times the summed loss; None computes the loss alone.
    """
    rows, wanted = hidden.flatten(0, 1), targets.flatten()
    module = head_module(model)
    weights = module.trainable_parameters() if gradient is not None else {}

    def loss(weights, h, t):
        module.update(weights)
        summed: Any = cross_entropy(wide(model.head(h)), t)
        return summed[0]

    graded = mx.value_and_grad(loss, argnums=(0, 1))
    result = HeadLoss()
    size = chunk_rows(model.config.vocabulary)
    for start in range(0, len(scored), size):
        places = scored[start : start + size]
        index = mx.array(places)
        h, t = rows[index], wanted[index]
        if count_correct:
            result.correct += int((model.head(h).argmax(axis=-1) == t).sum().item())
        if gradient is None:
            value = loss({}, h, t)
        else:
            value, (dweights, dh) = graded(weights, h, t)
            module.update(weights)
            dh = wide(dh) * scale
            dweights = tree_map(lambda g: g * scale, dweights)
            if result.head:
                dweights = tree_map(lambda a, b: a + b, result.head, dweights)
            mx.eval(value, dh, dweights)
            gradient[places] = np.array(dh)
            result.head = dweights
        result.total += value.item()
    result.count = len(scored)
    return result
