"""Attention of one to eight query rows over a whole cache buffer, plain or quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from . import dispatch
from .attention_reference import Rows, attention_reference
from .kv_quantize import QuantizedRows, rotate_rows, turned_block
from .source import integers, metal_kernel, numbers, unused

MAX_QUERIES = 8
MAX_DIM = 576
# Query rows that share one read of the cache, by head dim: their registers must fit a lane.
ROWS_BY_DIM = ((128, 8), (256, 4), (MAX_DIM, 2))

_INPUTS = (
    *("q", "keys", "key_scales", "key_biases", "values", "value_scales", "value_biases"),
    *("lengths", "starts", "sinks", "slopes", "mask", "sizes", "factors"),
)
_HAS_SINKS, _HAS_SLOPES, _HAS_MASK, _HAS_SOFTCAP = 1, 2, 4, 8


def available() -> bool:
    """Whether the kernel can run on the current device."""
    return dispatch.on_metal()


def supports(q: mx.array, keys: Rows, values: Rows | None, value_dim: int | None = None) -> bool:
    """Whether the kernel takes these shapes and types."""
    dims = (q.shape[-1], _value_dim(values, value_dim))
    chunk = 8 if _bits(keys) or _bits(values) else 4
    types = {q.dtype, keys.dtype, q.dtype if values is None else values.dtype}
    return (
        q.shape[2] <= MAX_QUERIES
        and all(d % chunk == 0 and 0 < d <= MAX_DIM for d in dims)
        and len(types) == 1
        and q.dtype in (mx.float16, mx.bfloat16, mx.float32)
    )


def attention_decode(
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
    """[B, H, T, Dv] for one to eight query rows; arguments as in ``attention_reference``."""
    way = dispatch.choose("attention_decode", supported=supports(q, keys, values, value_dim))
    function = launch if way == "kernel" else attention_reference
    return function(
        q,
        keys,
        values,
        lengths=lengths,
        scale=scale,
        window=window,
        sinks=sinks,
        softcap=softcap,
        slopes=slopes,
        mask=mask,
        starts=starts,
        value_dim=value_dim,
        longest=longest,
    )


attention_decode_reference = attention_reference


class _Buffers(NamedTuple):
    """One side of the cache, as the kernel takes it."""

    arrays: tuple[mx.array, mx.array, mx.array]
    bits: int  # 0: plain
    group_size: int
    words: int  # elements of the first array a row
    groups: int


def launch(
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
    """The kernel, whatever the table says; one launch, or two when the length is split."""
    batch, heads, queries, dim = q.shape
    kv_heads, capacity = keys.shape[1], keys.shape[2]
    dim_out = _value_dim(values, value_dim)
    dtype = q.dtype
    block = turned_block(keys, values, dim_out)
    if isinstance(keys, QuantizedRows) and keys.rotated:
        q = rotate_rows(q.astype(mx.float32))  # in float32: the turn must not cost accuracy
    result = mx.float32 if block else dtype
    key_side = _side(keys)
    value_side = key_side if values is None else _side(values)
    rows = query_tile(heads // kv_heads * queries, max(dim, dim_out))
    tiles = -(-(heads // kv_heads * queries) // rows)
    visible = min(capacity if longest is None else longest, capacity)
    if longest is None and not isinstance(lengths, mx.array):
        visible = min(max(lengths), capacity)
    if window:
        visible = min(visible, window + queries - 1)
    blocks = block_count(visible, batch * kv_heads * tiles)
    simdgroups = simdgroup_count(dim_out)
    flags = (
        (_HAS_SINKS if sinks is not None else 0)
        | (_HAS_SLOPES if slopes is not None else 0)
        | (_HAS_MASK if mask is not None else 0)
        | (_HAS_SOFTCAP if softcap else 0)
    )
    sinks = unused(mx.float32) if sinks is None else sinks
    split = blocks > 1
    out, stats = metal_kernel("attention_decode", _INPUTS, ("out", "stats"))(
        inputs=[
            q,
            *key_side.arrays,
            *value_side.arrays,
            per_sequence(lengths, batch),
            per_sequence(0 if starts is None else starts, batch),
            sinks,
            unused(mx.float32) if slopes is None else slopes,
            unused(mx.bool_) if mask is None else mask,
            integers(
                *(heads, kv_heads, queries, capacity, window or 0, flags),
                *mask_strides(mask),
                tiles,
            ),
            numbers(scale, softcap or 0.0),
        ],
        template=[
            ("T", dtype),
            ("QueryT", q.dtype),
            ("KeyT", key_side.arrays[0].dtype),
            ("ValueT", value_side.arrays[0].dtype),
            ("OutT", mx.float32 if split else result),
            ("D", dim),
            ("DV", dim_out),
            ("KEY_BITS", key_side.bits),
            ("KEY_GROUP", key_side.group_size),
            ("KEY_WORDS", key_side.words),
            ("KEY_GROUPS", key_side.groups),
            ("VALUE_BITS", value_side.bits),
            ("VALUE_GROUP", value_side.group_size),
            ("VALUE_WORDS", value_side.words),
            ("VALUE_GROUPS", value_side.groups),
            ("ROWS", rows),
            ("SIMDS", simdgroups),
            ("LATENT", values is None),
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
        (out,) = metal_kernel("attention_merge", ("partial", "stats", "sinks", "sizes"), ("out",))(
            inputs=[out, stats, sinks, integers(heads, queries, blocks, flags)],
            template=[("T", result), ("DV", dim_out)],
            grid=(-(-dim_out // 32) * 32, batch * heads * queries, 1),
            threadgroup=(min(256, -(-dim_out // 32) * 32), 1, 1),
            output_shapes=[(batch, heads, queries, dim_out)],
            output_dtypes=[result],
        )
    out = out.reshape(batch, heads, queries, dim_out)
    return rotate_rows(out, block).astype(dtype) if block else out


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


def per_sequence(values: mx.array | Sequence[int] | int, batch: int) -> mx.array:
    """[B] int32 from an array, a list or one number for all."""
    if isinstance(values, mx.array):
        return values if values.dtype == mx.int32 else values.astype(mx.int32)
    return integers(*([values] * batch if isinstance(values, int) else values))


def mask_strides(mask: mx.array | None) -> tuple[int, int, int, int]:
    """Elements from one batch, head, query and row of a mask to the next; 0 where it repeats."""
    if mask is None:
        return (0, 0, 0, 0)
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    step, strides = 1, []
    for n in reversed(shape):
        strides.append(step if n > 1 else 0)
        step *= n
    return (strides[3], strides[2], strides[1], strides[0])


def _side(rows: Rows) -> _Buffers:
    if isinstance(rows, QuantizedRows):
        arrays = (rows.codes, rows.scales, rows.biases)
        words, groups = rows.codes.shape[-1], rows.scales.shape[-1]
        return _Buffers(arrays, rows.bits, rows.group_size, words, groups)
    nothing = unused(rows.dtype)
    return _Buffers((rows, nothing, nothing), 0, 1, rows.shape[-1], 0)


def _bits(rows: Rows | None) -> int:
    return rows.bits if isinstance(rows, QuantizedRows) else 0


def _value_dim(values: Rows | None, value_dim: int | None) -> int:
    if values is not None:
        return values.shape[-1]
    if value_dim is None:
        raise ValueError("a latent cache (values=None) needs value_dim")
    return value_dim
