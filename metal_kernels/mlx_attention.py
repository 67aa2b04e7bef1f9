"""Attention by MLX's own fused kernels, for the cases where one launch does all."""

from __future__ import annotations

import mlx.core as mx

from .attention_reference import AttentionOptions, Rows
from .kv_quantize import QuantizedRows, kv_dequantize

# What MLX 0.32 fuses: scaled_dot_product_attention.cpp, supports_sdpa_vector and _full.
VECTOR_DIMS = (64, 96, 128, 256)
FULL_DIMS = (64, 80, 128)
VECTOR_QUERIES = 8
VECTOR_ROWS = 32  # query rows that share a key/value head; for more, MLX makes all scores
# Dequantized keys and values held for one launch, at most.
DEQUANTIZED_BYTES = 64 << 20


def fusable(q: mx.array, keys: Rows, values: Rows | None, options: AttentionOptions) -> bool:
    """Whether ``mx.fast`` does this in one fused launch, all sequences being of one length."""
    alone = ("softcap", "slopes", "mask", "starts")
    if values is None or any(options.get(name) is not None for name in alone):
        return False
    lengths, window = options["lengths"], options.get("window")
    if isinstance(lengths, mx.array) or min(lengths) != max(lengths):
        return False
    queries, dim = q.shape[2], q.shape[3]
    if dim != values.shape[-1] or (window and queries > 1):
        return False
    quantized = isinstance(keys, QuantizedRows) or isinstance(values, QuantizedRows)
    if queries <= VECTOR_QUERIES:
        rows = q.shape[1] // keys.shape[1] * queries
        return dim in VECTOR_DIMS and rows <= VECTOR_ROWS and not quantized
    size = 2 * keys.shape[0] * keys.shape[1] * max(lengths) * dim * q.itemsize
    return dim in FULL_DIMS and (not quantized or size <= DEQUANTIZED_BYTES)


def fused(q: mx.array, keys: Rows, values: Rows | None, options: AttentionOptions) -> mx.array:
    """``mx.fast.scaled_dot_product_attention`` over the filled rows: views of a plain cache, a
    dequantized copy of a quantized one."""
    lengths, window, sinks = options["lengths"], options.get("window"), options.get("sinks")
    assert values is not None and not isinstance(lengths, mx.array), "not fusable"
    stop = max(lengths)
    start = max(0, stop - window) if window else 0
    return mx.fast.scaled_dot_product_attention(
        q,
        _plain(keys, start, stop),
        _plain(values, start, stop),
        scale=options["scale"],
        mask="causal" if q.shape[2] > 1 else None,
        sinks=sinks if sinks is None else sinks.astype(q.dtype),
    )


def _plain(rows: Rows, start: int, stop: int) -> mx.array:
    if isinstance(rows, QuantizedRows):
        return kv_dequantize(rows.rows(start, stop))
    return rows[:, :, start:stop]
