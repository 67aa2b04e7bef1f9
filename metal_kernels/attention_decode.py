"""Attention of one to eight query rows over a whole cache buffer, plain or quantized."""

from __future__ import annotations

from typing import Unpack

import mlx.core as mx

from . import attention_launch, dispatch
from .attention_launch import MAX_DIM
from .attention_reference import AttentionOptions, Rows, attention_reference
from .kv_quantize import rotate_rows
from .source import integers, metal_kernel

MAX_QUERIES = 8
# Query rows that share one read of the cache, by head dim: their registers must fit a lane.
ROWS_BY_DIM = ((128, 8), (256, 4), (MAX_DIM, 2))


def available() -> bool:
    """Whether the kernel can run on the current device."""
    return dispatch.on_metal()


def supports(q: mx.array, keys: Rows, values: Rows | None, value_dim: int | None = None) -> bool:
    """Whether the kernel takes these shapes and types."""
    return q.shape[2] <= MAX_QUERIES and attention_launch.supports(q, keys, values, value_dim, 4)


def attention_decode(
    q: mx.array, keys: Rows, values: Rows | None, **options: Unpack[AttentionOptions]
) -> mx.array:
    """[B, H, T, Dv] for one to eight query rows; arguments as in ``attention_reference``."""
    supported = supports(q, keys, values, options.get("value_dim"))
    return attention_launch.dispatched(
        "attention_decode", launch, supported, q, keys, values, options
    )


attention_decode_reference = attention_reference


def launch(
    q: mx.array, keys: Rows, values: Rows | None, **options: Unpack[AttentionOptions]
) -> mx.array:
    """The kernel, whatever the table says; one launch, or two when the length is split."""
    batch, heads, queries, dim = q.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    dim_out = attention_launch.width_of(values, options.get("value_dim"))
    rows = query_tile(heads // kv_heads * queries, max(dim, dim_out))
    tiles = -(-(heads // kv_heads * queries) // rows)
    prepared = attention_launch.prepare(q, keys, values, tiles, options)
    visible = attention_launch.longest_row(options, capacity)
    if window := options.get("window"):
        visible = min(visible, window + queries - 1)
    blocks = block_count(visible, batch * kv_heads * tiles)
    simdgroups = simdgroup_count(dim_out)
    split, result = blocks > 1, prepared.result
    out, stats = metal_kernel(
        "attention_decode",
        attention_launch.INPUTS,
        ("out", "stats"),
        contiguous=False,
        helpers=("cache_rows",),
    )(
        inputs=prepared.inputs,
        template=[
            *prepared.template,
            ("OutT", mx.float32 if split else result),
            ("ROWS", rows),
            ("SIMDS", simdgroups),
            ("SPLIT", split),
        ],
        grid=(32 * simdgroups, batch * kv_heads * tiles, blocks),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[
            (batch, heads, queries, blocks, dim_out),
            (batch, heads, queries, blocks, 2),
        ],
        output_dtypes=[mx.float32 if split else result, mx.float32],
    )
    if split:
        merge = metal_kernel("attention_merge", ("partial", "stats", "sinks", "sizes"), ("out",))
        (out,) = merge(
            inputs=[out, stats, prepared.sinks, integers(heads, queries, blocks, prepared.flags)],
            template=[("T", result), ("DV", dim_out)],
            grid=(-(-dim_out // 32) * 32, batch * heads * queries, 1),
            threadgroup=(min(256, -(-dim_out // 32) * 32), 1, 1),
            output_shapes=[(batch, heads, queries, dim_out)],
            output_dtypes=[result],
        )
    out = out.reshape(batch, heads, queries, dim_out)
    return rotate_rows(out, prepared.block).astype(q.dtype) if prepared.block else out


def query_tile(rows: int, dim: int) -> int:
    """Query rows that one read of the cache serves."""
    most = next(tile for limit, tile in ROWS_BY_DIM if dim <= limit)
    tile = 1
    while tile < min(rows, most):
        tile *= 2
    return tile


def block_count(visible: int, threadgroups: int) -> int:
    """Parts the cache is split into: one for short caches, else enough to fill the GPU."""
    numbers_ = dispatch.tuning()
    if visible <= numbers_.single_pass_rows:
        return 1
    by_rows = -(-visible // (32 * numbers_.simdgroups))  # a step for each simdgroup at least
    return max(1, min(by_rows, -(-numbers_.threadgroups // threadgroups)))


def simdgroup_count(dim_out: int) -> int:
    """Simdgroups of a threadgroup; their sums must fit 32 KB together."""
    most = dispatch.tuning().simdgroups
    while most > 1 and most * dim_out * 4 > 24 * 1024:
        most //= 2
    return most
