"""What every kind of layer cache can do, and the one that keeps nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx

from mlxtx.cache.attention import AttentionSpec, alibi_bias, attention, causal_mask
from mlxtx.cache.step import Step

Prepare = Callable[[mx.array, mx.array | None, Step], tuple[mx.array, mx.array | None]]
Expand = Callable[[mx.array], tuple[mx.array, mx.array]]


class LayerCache(Protocol):
    """Keys and values of one layer, and attention over them."""

    def attend(
        self,
        q: mx.array,
        k: mx.array | None,
        v: mx.array | None,
        *,
        prepare: Prepare,
        spec: AttentionSpec,
        step: Step,
        sinks: mx.array | None = None,
        expand: Expand | None = None,
    ) -> mx.array:
        """Appends k and v and attends over all rows: [B, H, T, Dv].

        q [B, H, T, D] and k [B, K, T, D] come as projected; ``prepare`` normalises and rotates
        them at the step's positions. v is [B, K, T, Dv], or None when values are the first
        ``spec.value_dim`` channels of the key rows. k None attends over the rows that are there
        (a layer that shares another's cache). ``expand`` turns rows into keys and values of all
        heads (latent attention over a long prompt).
        """
        ...


def attend_rows(
    q: mx.array,
    k: mx.array,
    v: mx.array | None,
    *,
    spec: AttentionSpec,
    step: Step,
    sinks: mx.array | None = None,
    expand: Expand | None = None,
) -> mx.array:
    """Attention of the step's queries over the newest rows, which lie in plain arrays."""
    rows = k.shape[2]
    if expand is not None:
        k, v = expand(k)
    elif v is None:
        v = k[..., : spec.value_dim]
    return attention(
        q,
        k,
        v,
        spec=spec,
        mask=causal_mask(spec, step, rows),
        sinks=sinks,
        bias=alibi_bias(spec, step, rows) if spec.slopes else None,
    )


class Uncached:
    """Attention within one forward pass that keeps nothing (training, scoring)."""

    def __init__(self) -> None:
        self._k: mx.array | None = None
        self._v: mx.array | None = None

    def attend(self, q, k, v, *, prepare, spec, step, sinks=None, expand=None) -> mx.array:
        q, k = prepare(q, k, step)
        if k is not None:
            self._k, self._v = k, v  # for a later layer that shares them
        assert self._k is not None
        return attend_rows(q, self._k, self._v, spec=spec, step=step, sinks=sinks, expand=expand)
