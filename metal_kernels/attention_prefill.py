"""Attention of any number of query rows over a whole cache buffer, plain or quantized."""

from __future__ import annotations

from typing import Unpack

import mlx.core as mx

from . import attention_launch, dispatch
from .attention_reference import AttentionOptions, Rows, attention_reference
from .kv_quantize import rotate_rows
from .source import metal_kernel

SIMDGROUPS = 4
# Threadgroup memory for the queries of a tile and for its cache rows; together under 32 KB.
QUERY_BYTES, CACHE_BYTES = 19 << 10, 11 << 10


def available() -> bool:
    """Whether the kernel can run on the current device."""
    return dispatch.on_metal()


def supports(q: mx.array, keys: Rows, values: Rows | None, value_dim: int | None = None) -> bool:
    """Whether the kernel takes these shapes and types."""
    return attention_launch.supports(q, keys, values, value_dim, 8)


def attention_prefill(
    q: mx.array, keys: Rows, values: Rows | None, **options: Unpack[AttentionOptions]
) -> mx.array:
    """[B, H, T, Dv] for any number of query rows; arguments as in ``attention_reference``."""
    supported = supports(q, keys, values, options.get("value_dim"))
    return attention_launch.dispatched(
        "attention_prefill", launch, supported, q, keys, values, options
    )


attention_prefill_reference = attention_reference


def launch(
    q: mx.array, keys: Rows, values: Rows | None, **options: Unpack[AttentionOptions]
) -> mx.array:
    """The kernel, whatever the table says."""
    batch, heads, queries, dim = q.shape
    kv_heads = keys.shape[1]
    dim_out = attention_launch.width_of(values, options.get("value_dim"))
    query_size = 4 if getattr(keys, "rotated", False) else q.itemsize
    row_groups, cache_rows, shared = tile_shape(dim, dim_out, query_size, q.itemsize)
    tiles = -(-(heads // kv_heads * queries) // (8 * row_groups))
    prepared = attention_launch.prepare(q, keys, values, tiles, options)
    kernel = metal_kernel(
        "attention_prefill",
        attention_launch.INPUTS,
        ("out",),
        contiguous=False,
        helpers=("cache_rows",),
    )
    (out,) = kernel(
        inputs=prepared.inputs,
        template=[
            *prepared.template,
            ("OutT", prepared.result),
            ("QS", row_groups),
            ("DS", SIMDGROUPS // row_groups),
            ("BK", cache_rows),
            ("SHARED_QUERIES", shared),
        ],
        grid=(32 * SIMDGROUPS, batch * kv_heads * tiles, 1),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        output_shapes=[(batch, heads, queries, dim_out)],
        output_dtypes=[prepared.result],
    )
    return rotate_rows(out, prepared.block).astype(q.dtype) if prepared.block else out


def tile_shape(dim: int, dim_out: int, query_size: int, size: int) -> tuple[int, int, bool]:
    """Groups of eight query rows, cache rows, and whether the queries too are in threadgroup memory.

    The simdgroups that a tile of queries leaves free share its channels, in whole matrices.
    """
    groups = SIMDGROUPS
    while groups > 1 and 8 * groups * (dim + 8) * query_size > QUERY_BYTES:
        groups //= 2
    while dim // 8 % (SIMDGROUPS // groups):
        groups *= 2
    rows = 32
    while rows > 8 and rows * (max(dim, dim_out) + 8) * size > CACHE_BYTES:
        rows //= 2
    queries = 8 * groups * (dim + 8) * query_size
    partial = SIMDGROUPS // groups * 8 * groups * rows * 4
    shared = queries + rows * (max(dim, dim_out) + 8) * size + partial <= 32 << 10
    return groups, rows, shared
