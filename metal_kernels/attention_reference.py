"""Attention over a cache buffer in plain mx operations: what both attention kernels must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Required, TypedDict

import mlx.core as mx

from .kv_quantize import QuantizedRows, kv_dequantize, rotate_rows, turned_block

Rows = mx.array | QuantizedRows

# Scores held at a time (elements) and cache rows taken at a time: bounds the memory of the loop.
SCORES_AT_A_TIME = 1 << 22
ROWS_AT_A_TIME = 2048


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of attention; ``attention_reference`` says what each one means."""

    lengths: Required[mx.array | Sequence[int]]
    scale: Required[float]
    window: int | None
    sinks: mx.array | None
    softcap: float | None
    slopes: mx.array | None
    mask: mx.array | None
    starts: mx.array | Sequence[int] | None
    value_dim: int | None
    longest: int | None


def attention_reference(
    q: mx.array,
    keys: Rows,
    values: Rows | None,
    *,
    lengths: mx.array | Sequence[int],
    scale: float,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    slopes: mx.array | None = None,
    mask: mx.array | None = None,
    starts: mx.array | Sequence[int] | None = None,
    value_dim: int | None = None,
    longest: int | None = None,
) -> mx.array:
    """softmax(cap(scale q k) + bias) v over the filled rows of a cache: [B, H, T, Dv] in q's dtype.

    q: [B, H, T, D], already normalised and rotated. keys: [B, K, S, D]; values: [B, K, S, Dv]; the
        whole buffers, H a multiple of K, query head h reads key/value head h // (H / K).
        ``values=None``: a latent cache, values are the first ``value_dim`` channels of the keys.
    lengths: [B] filled rows; query row t of T stands at position p = lengths - T + t.
    starts: [B] first row that is not padding (default 0). Row j is seen when
        starts <= j <= p, and p - j < window if a window is given (the row itself counts), and
        ``mask[..., t, j]`` is true if a boolean mask, broadcastable to [B, H, T, >= longest], is.
    softcap: scores become softcap * tanh(scores / softcap).
    slopes: [H], ALiBi, adds slope * (j - p).
    sinks: [H] logits that take part in the sum of the softmax and have no value.
    longest: an upper bound of ``lengths`` known without evaluating it; no row beyond it is read.

    A query row that sees nothing gives 0. Sums are float32 (float64 for float64). Scores are
    made for a bounded number of rows at a time, with the running maximum and sum of the online
    softmax (Milakov and Gimelshein, 2018, arXiv:1805.02867), evaluated slice by slice where
    evaluation is possible (inside compile and grad it is not).
    """
    batch, heads, count, _ = q.shape
    if longest is None:
        longest = keys.shape[2] if isinstance(lengths, mx.array) else max(lengths)
    longest = min(longest, keys.shape[2])
    lengths = _integers(lengths).reshape(batch, 1, 1, 1, 1)
    first = _integers([0] if starts is None else starts).reshape(-1, 1, 1, 1, 1)
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    precision = mx.float64 if q.dtype == mx.float64 else mx.float32
    queries = q.astype(precision)
    width = value_dim if values is None else values.shape[-1]
    assert width is not None, "a latent cache needs value_dim"
    block = turned_block(keys, values, width)
    if isinstance(keys, QuantizedRows) and keys.rotated:
        keys = keys._replace(rotated=False)  # turning q is less work than turning the rows back
        queries = rotate_rows(queries)
    if isinstance(values, QuantizedRows):
        values = values._replace(rotated=False)
    queries = queries.reshape(batch, kv_heads, group, count, -1) * scale  # [B, K, G, T, D]
    per_head = (1, kv_heads, group, 1, 1)
    rows_step = min(ROWS_AT_A_TIME, max(longest, 1))
    query_step = max(1, SCORES_AT_A_TIME // (batch * heads * rows_step))
    many = query_step < count or rows_step < longest

    results = []
    for t0 in range(0, count, query_step):
        t1 = min(count, t0 + query_step)
        part = queries[:, :, :, t0:t1]
        position = lengths - count + mx.arange(t0, t1).reshape(1, 1, 1, -1, 1)  # [B, 1, 1, T, 1]
        maximum = mx.full((batch, kv_heads, group, t1 - t0, 1), -mx.inf, dtype=precision)
        total = mx.zeros_like(maximum)
        sums: mx.array | None = None
        for s0 in range(0, longest, rows_step):
            s1 = min(longest, s0 + rows_step)
            key_rows = _rows(keys, s0, s1, precision)  # [B, K, S, D]
            value_rows = (
                key_rows[..., :value_dim] if values is None else _rows(values, s0, s1, precision)
            )
            scores = part @ key_rows[:, :, None].swapaxes(-1, -2)  # [B, K, G, T, S]
            if softcap:
                scores = mx.tanh(scores / softcap) * softcap
            row = mx.arange(s0, s1)
            if slopes is not None:
                scores = scores + slopes.astype(precision).reshape(per_head) * (row - position)
            seen = (row <= position) & (row >= first)
            if window is not None:
                seen = seen & (position - row < window)
            if mask is not None:
                seen = seen & _mask_slice(mask, t0, t1, s0, s1, count, kv_heads)
            scores = mx.where(seen, scores, -mx.inf)
            higher = mx.maximum(maximum, scores.max(axis=-1, keepdims=True))
            finite = mx.where(mx.isinf(higher), 0, higher)  # -inf minus -inf is not a number
            weights = mx.exp(scores - finite)
            kept = mx.exp(maximum - finite)
            total = total * kept + weights.sum(axis=-1, keepdims=True)
            product = weights @ value_rows[:, :, None]
            sums = product if sums is None else sums * kept + product
            maximum = higher
            if many:
                _evaluate(maximum, total, sums)
        assert sums is not None
        if sinks is not None:
            # A sink scales the result by sum / (sum + exp(sink - maximum)).
            total = total + mx.exp(sinks.astype(precision).reshape(per_head) - maximum)
        result = mx.where(mx.isinf(maximum), 0, sums / mx.where(mx.isinf(maximum), 1, total))
        if many:
            _evaluate(result)
        results.append(result)
    output = results[0] if len(results) == 1 else mx.concatenate(results, axis=3)
    output = output.reshape(batch, heads, count, -1)
    return (rotate_rows(output, block) if block else output).astype(q.dtype)


def _integers(values: mx.array | Sequence[int]) -> mx.array:
    return values if isinstance(values, mx.array) else mx.array(list(values))


def _rows(rows: Rows, start: int, stop: int, precision: mx.Dtype) -> mx.array:
    if isinstance(rows, QuantizedRows):
        return kv_dequantize(rows.rows(start, stop), mx.float32).astype(precision)
    return rows[:, :, start:stop].astype(precision)


def _mask_slice(
    mask: mx.array, t0: int, t1: int, s0: int, s1: int, count: int, kv_heads: int
) -> mx.array:
    """The part of a mask [b, h, t, s] for these queries and rows, as [b, k, g, t, s]."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[2] == count:
        mask = mask[:, :, t0:t1]
    if mask.shape[3] > 1:
        mask = mask[..., s0:s1]
    if mask.shape[1] > 1:
        return mask.reshape(mask.shape[0], kv_heads, -1, *mask.shape[2:])
    return mask[:, :, None]


def _evaluate(*arrays: mx.array) -> None:
    """Evaluate, unless a transformation is tracing, which allows no evaluation."""
    try:
        mx.eval(*arrays)
    except ValueError:
        return
