"""What every kind of layer cache can do, and the cache of a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


class PlainCache:
    """Keys and values as they are, in buffers [B, K, capacity, D] that grow by half."""

    block = 256  # rows: capacities are whole blocks

    def __init__(self) -> None:
        self.rows = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self._keys, self._values) if a is not None)

    def state(self) -> list[mx.array]:
        return [a for a in (self._keys, self._values) if a is not None]

    def _append(self, buffer: mx.array | None, new: mx.array) -> mx.array:
        batch, heads, count, dim = new.shape
        needed = self.rows + count
        if buffer is None:
            buffer = mx.zeros((batch, heads, 0, dim), new.dtype)
        capacity = buffer.shape[2]
        if needed > capacity:
            grown = max(needed, capacity + capacity // 2)
            grown = -(-grown // self.block) * self.block
            extra = mx.zeros((batch, heads, grown - capacity, dim), new.dtype)
            buffer = mx.concatenate([buffer, extra], axis=2) if capacity else extra
        buffer[:, :, self.rows : needed] = new
        return buffer

    def attend(self, q, k, v, *, prepare, spec, step, sinks=None, expand=None) -> mx.array:
        q, k = prepare(q, k, step)
        if k is not None:
            self._keys = self._append(self._keys, k)
            if v is not None:
                self._values = self._append(self._values, v)
            self.rows += k.shape[2]
        assert self._keys is not None
        first = 0
        if spec.only_window:  # older rows can't be seen by any of the step's queries
            first = max(0, self.rows - spec.window - step.count + 1)
        keys = self._keys[:, :, first : self.rows]
        values = None if self._values is None else self._values[:, :, first : self.rows]
        return attend_rows(q, keys, values, spec=spec, step=step, sinks=sinks, expand=expand)

    def rollback(self, count: int) -> None:
        self.rows -= count

    def copy(self) -> PlainCache:
        other = PlainCache()
        other.rows = self.rows
        # Handles of their own: a slice update changes the very object it is written to, but the
        # rows behind it are only copied when another handle still holds them.
        other._keys, other._values = (
            None if array is None else mx.array(array) for array in (self._keys, self._values)
        )
        return other


class ModelCache:
    """The caches of all layers of one batch, and how far it has been fed.

    ``offset`` counts the tokens of a row, padding included. ``layers[i]`` may be the very
    object of an earlier layer whose keys and values layer i shares.
    """

    def __init__(self, layers: Sequence, *, left_padding: Sequence[int] | None = None):
        self.layers = list(layers)
        self.left_padding = None if left_padding is None else tuple(left_padding)
        self.offset = 0

    def set_left_padding(self, left_padding: Sequence[int]) -> None:
        """Padding of each row, told before the first token or together with it."""
        if self.offset and tuple(left_padding) != self.left_padding:
            raise ValueError("left_padding can't change once the cache holds tokens")
        self.left_padding = tuple(left_padding)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator:
        return iter(self.layers)

    def _distinct(self) -> list:
        return list({id(layer): layer for layer in self.layers}.values())

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._distinct())

    def state(self) -> list[mx.array]:
        """The arrays to evaluate so that nothing of the cache stays lazy."""
        return [array for layer in self._distinct() for array in layer.state()]

    def rollback(self, count: int) -> None:
        """Forgets the newest ``count`` tokens."""
        if not 0 <= count <= self.offset:
            raise ValueError(f"can't roll back {count} of {self.offset} tokens")
        for layer in self._distinct():
            layer.rollback(count)
        self.offset -= count

    def copy(self) -> ModelCache:
        """A cache that goes on from here on its own; rows are shared until one of them changes."""
        copies = {id(layer): layer.copy() for layer in self._distinct()}
        other = ModelCache(
            [copies[id(layer)] for layer in self.layers], left_padding=self.left_padding
        )
        other.offset = self.offset
        return other
