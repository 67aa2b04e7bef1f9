"""What the launches of both attention kernels share: their inputs and how a cache is described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from . import dispatch
from .attention_reference import AttentionOptions, Rows, attention_reference
from .kv_quantize import KERNEL_TYPES, QuantizedRows, rotate_rows, turned_block
from .mlx_attention import fusable, fused
from .source import integers, numbers, unused

MAX_DIM = 576
INPUTS = (
    *("q", "keys", "values", "lengths", "starts"),
    *("sinks", "slopes", "mask", "sizes", "factors"),
)
# Bits of SIZE_FLAGS in cache_rows.metal.
HAS_SINKS, HAS_SLOPES, HAS_MASK, HAS_SOFTCAP = 1, 2, 4, 8


class Side(NamedTuple):
    """The keys or the values of a cache, as the kernels take them."""

    array: mx.array
    bits: int  # 0: plain
    group_size: int


class Prepared(NamedTuple):
    """One launch, up to its tiles and grid."""

    inputs: list[mx.array]
    template: list[tuple[str, Any]]
    flags: int
    sinks: mx.array
    result: mx.Dtype  # of the output, before it is turned back
    block: int | None  # Hadamard block the output must go back through


def supports(
    q: mx.array, keys: Rows, values: Rows | None, value_dim: int | None, multiple: int
) -> bool:
    """Whether the kernels take these shapes and types."""
    quantized = isinstance(keys, QuantizedRows) or isinstance(values, QuantizedRows)
    chunk = 8 if quantized else multiple
    dims = (q.shape[-1], width_of(values, value_dim))
    types = {q.dtype, keys.dtype, q.dtype if values is None else values.dtype}
    return (
        all(d % chunk == 0 and 0 < d <= MAX_DIM for d in dims)
        and len(types) == 1
        and q.dtype in KERNEL_TYPES
    )


def dispatched(
    operation: str,
    launch: Callable[..., mx.array],
    supported: bool,
    q: mx.array,
    keys: Rows,
    values: Rows | None,
    options: AttentionOptions,
) -> mx.array:
    """Attention by the way the table gives: ``launch``, MLX's fused kernel or the reference."""
    fast = fusable(q, keys, values, options)
    way = dispatch.choose(operation, supported=supported, fused_by_mlx=fast)
    if way == "fast":
        return fused(q, keys, values, options)
    return (launch if way == "kernel" else attention_reference)(q, keys, values, **options)


def prepare(
    q: mx.array, keys: Rows, values: Rows | None, tiles: int, options: AttentionOptions
) -> Prepared:
    """Inputs in the order of ``INPUTS`` and the template parameters of the cache."""
    window, softcap = options.get("window"), options.get("softcap")
    sinks, slopes, mask = options.get("sinks"), options.get("slopes"), options.get("mask")
    starts, value_dim = options.get("starts"), options.get("value_dim")
    batch, heads, queries, dim = q.shape
    dtype, dim_out = q.dtype, width_of(values, value_dim)
    block = turned_block(keys, values, dim_out)
    if isinstance(keys, QuantizedRows) and keys.rotated:
        q = rotate_rows(q.astype(mx.float32))  # in float32: the turn must not cost accuracy
    key_side = side_of(keys)
    value_side = key_side if values is None else side_of(values)
    flags = (
        (HAS_SINKS if sinks is not None else 0)
        | (HAS_SLOPES if slopes is not None else 0)
        | (HAS_MASK if mask is not None else 0)
        | (HAS_SOFTCAP if softcap else 0)
    )
    sinks = unused(mx.float32) if sinks is None else sinks
    # 0 along an axis whose single element counts for all.
    repeats = (0, 0, 0, 0)
    if mask is not None:
        mask = four_axes(mask)
        repeats = tuple(int(n > 1) for n in mask.shape)  # type: ignore[assignment]
    sizes = (heads, keys.shape[1], queries, keys.shape[2], window or 0, flags)
    inputs = [
        q,
        key_side.array,
        value_side.array,
        per_sequence(options["lengths"], batch),
        per_sequence(0 if starts is None else starts, batch),
        sinks,
        unused(mx.float32) if slopes is None else slopes,
        unused(mx.bool_) if mask is None else mask,
        integers(*sizes, *repeats, tiles),
        numbers(options["scale"], softcap or 0.0),
    ]
    template = [
        ("T", dtype),
        ("QueryT", q.dtype),
        ("KeyT", key_side.array.dtype),
        ("ValueT", value_side.array.dtype),
        ("D", dim),
        ("DV", dim_out),
        *_parameters("KEY", key_side),
        *_parameters("VALUE", value_side),
        ("LATENT", values is None),
    ]
    return Prepared(inputs, template, flags, sinks, mx.float32 if block else dtype, block)


def _parameters(name: str, side: Side) -> list[tuple[str, Any]]:
    return [
        (f"{name}_BITS", side.bits),
        (f"{name}_GROUP", side.group_size),
    ]


def side_of(rows: Rows) -> Side:
    if isinstance(rows, QuantizedRows):
        return Side(rows.words, rows.bits, rows.group_size)
    return Side(rows, 0, 1)


def width_of(values: Rows | None, value_dim: int | None) -> int:
    """Channels of a value."""
    if values is not None:
        return values.shape[-1]
    if value_dim is None:
        raise ValueError("a latent cache (values=None) needs value_dim")
    return value_dim


def per_sequence(values: mx.array | Sequence[int] | int, batch: int) -> mx.array:
    """[B] int32 from an array, a list or one number for all."""
    if isinstance(values, mx.array):
        return values if values.dtype == mx.int32 else values.astype(mx.int32)
    return integers(*([values] * batch if isinstance(values, int) else values))


def four_axes(mask: mx.array) -> mx.array:
    """A mask as [b, h, t, s]."""
    return mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))


def longest_row(options: AttentionOptions, capacity: int) -> int:
    """An upper bound of the lengths that needs no evaluation."""
    lengths, longest = options["lengths"], options.get("longest")
    if longest is None:
        longest = capacity if isinstance(lengths, mx.array) else max(lengths)
    return min(longest, capacity)
