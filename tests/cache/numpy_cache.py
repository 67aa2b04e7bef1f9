"""A cache that is nothing but a list of rows, and attention over them in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlxtx.metal_kernels.kv_quantize import kv_dequantize

from mlxtx.cache.attention import AttentionSpec
from mlxtx.cache.layer import TAIL_SLACK, LayerLayout
from mlxtx.cache.rows import RowFormat


def seen_rows(
    spec: AttentionSpec, query: int, row: int, padding: int
) -> bool:  # indices, padding included
    if row > query or row < padding:
        return False
    if spec.chunk is not None and (query - padding) // spec.chunk != (row - padding) // spec.chunk:
        return False
    if spec.window is None or query - row < spec.window:
        return True
    if spec.stride is not None and (query - row) % spec.stride == 0:
        return True
    return row - padding < spec.global_tokens


def attend(q, k, v, spec, *, padding, sinks=None) -> np.ndarray:
    """The newest T of S rows' queries [B, H, T, D] over k [B, K, S, D], v [B, K, S, Dv]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, heads, count, _ = q.shape
    rows = k.shape[2]
    group = heads // k.shape[1]
    out = np.zeros((batch, heads, count, v.shape[-1]))
    for b in range(batch):
        for t in range(count):
            position = rows - count + t
            seen = [j for j in range(rows) if seen_rows(spec, position, j, padding[b])]
            if not seen:
                continue
            for h in range(heads):
                scores = spec.scale * k[b, h // group, seen] @ q[b, h, t]
                if spec.softcap is not None:
                    scores = spec.softcap * np.tanh(scores / spec.softcap)
                if spec.slopes:
                    scores = scores + spec.slopes[h] * (np.array(seen) - position)
                highest = max(scores.max(), -np.inf if sinks is None else sinks[h])
                weights = np.exp(scores - highest)
                total = weights.sum() + (0 if sinks is None else np.exp(sinks[h] - highest))
                out[b, h, t] = weights @ v[b, h // group, seen] / total
    return out


def through(row_format: RowFormat, rows: np.ndarray) -> np.ndarray:
    """What rows are after they were kept in a format."""
    if row_format.bits is None:
        return rows
    return np.array(kv_dequantize(row_format.encode(mx.array(rows)), mx.float32))


class NumpyCache:
    """Keeps raw and decoded rows side by side and says which of the two attention sees."""

    def __init__(self, layout: LayerLayout):
        self.layout = layout
        self.k: np.ndarray | None = None
        self.v: np.ndarray | None = None
        self.boundary = layout.head  # rows from here on are in the tail

    @property
    def rows(self) -> int:
        return 0 if self.k is None else self.k.shape[2]

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        self.k = k if self.k is None else np.concatenate([self.k, k], axis=2)
        self.v = v if self.v is None else np.concatenate([self.v, v], axis=2)
        extra = self.rows - self.boundary - self.layout.newest
        if extra > (TAIL_SLACK if self.layout.newest else 0):
            self.boundary += extra

    def rollback(self, count: int) -> None:
        assert self.k is not None and self.v is not None
        stop = self.rows - count
        self.k, self.v = self.k[:, :, :stop], self.v[:, :, :stop]
        self.boundary = max(self.layout.head, min(self.boundary, stop))

    def copy(self) -> NumpyCache:
        other = NumpyCache(self.layout)
        other.k, other.v, other.boundary = self.k, self.v, self.boundary
        return other

    def decoded(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.k is not None and self.v is not None
        index = np.arange(self.rows)[None, None, :, None]
        in_tail = (index >= self.boundary) & bool(self.layout.newest)
        kept = (index < self.layout.head) & bool(self.layout.first)
        keys, values = (
            through(self.layout.key_format, self.k),
            through(self.layout.value_format, self.v),
        )
        plain = in_tail | kept
        return np.where(plain, self.k, keys), np.where(plain, self.v, values)
