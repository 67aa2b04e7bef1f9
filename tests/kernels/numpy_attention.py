"""Attention in float64 numpy, from the formula: the oracle of kernels and references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def attention_float64(
    q: np.ndarray,  # [B, H, T, D]
    k: np.ndarray,  # [B, K, S, D]
    v: np.ndarray,  # [B, K, S, Dv]
    *,
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
    sinks: np.ndarray | None = None,
    softcap: float | None = None,
    slopes: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    starts: Sequence[int] | None = None,
    dtype: type = np.float64,
) -> np.ndarray:
    """[B, H, T, Dv]; a row that sees nothing is 0. ``dtype`` float32 gives numpy's own error."""
    batch, heads, count, _ = q.shape
    group = heads // k.shape[1]
    result = np.zeros((batch, heads, count, v.shape[-1]), dtype=dtype)
    if mask is not None:
        mask = np.broadcast_to(mask, (batch, heads, count, mask.shape[-1]))
    for b in range(batch):
        length, start = lengths[b], starts[b] if starts is not None else 0
        row = np.arange(length)
        position = (length - count + np.arange(count))[:, None]
        seen = (row <= position) & (row >= start)
        if window is not None:
            seen &= position - row < window
        for h in range(heads):
            keys = k[b, h // group, :length].astype(dtype)
            values = v[b, h // group, :length].astype(dtype)
            scores = (q[b, h].astype(dtype) @ keys.T) * dtype(scale)
            if softcap:
                scores = np.tanh(scores / dtype(softcap)) * dtype(softcap)
            if slopes is not None:
                scores = scores + dtype(slopes[h]) * (row - position).astype(dtype)
            visible = seen if mask is None else seen & mask[b, h, :, :length]
            for t in range(count):
                used = visible[t]
                if not used.any():
                    continue
                logits = scores[t, used]
                top = logits.max() if sinks is None else max(logits.max(), dtype(sinks[h]))
                weights = np.exp(logits - top)
                total = weights.sum()
                if sinks is not None:
                    total = total + np.exp(dtype(sinks[h]) - top)
                result[b, h, t] = (weights @ values[used]) / total
    return result
