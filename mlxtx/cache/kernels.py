"""Where attention over a cache leaves plain ``mx`` operations: MLX's fused kernel and our own.

The kernels take whole buffers and a length, never a slice, which would be copied at each step.
A ring that has wrapped, and new rows that are not in it yet, are joined to one stretch first: a
window is short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlxtx.cache.attention import AttentionSpec, visible
from mlxtx.cache.codes import split_by_blocks
from mlxtx.cache.numerics import on_gpu
from mlxtx.cache.rows import RowFormat, Rows, array_of, slice_rows, with_array
from mlxtx.cache.segment import Part
from mlxtx.cache.step import Step
from mlxtx.metal_kernels.attention_decode import MAX_QUERIES, attention_decode
from mlxtx.metal_kernels.attention_prefill import attention_prefill
from mlxtx.metal_kernels.dispatch import on_metal
from mlxtx.metal_kernels.kv_quantize import QuantizedRows, kv_dequantize
from mlxtx.metal_kernels.rope import rope, rope_quantize
from mlxtx.metal_kernels.rope import supports as rope_supported

Expand = Callable[[mx.array], tuple[mx.array, mx.array]]

# Latent rows are expanded for all heads at once up to this many bytes, else slice by slice.
EXPANDED_BYTES = 256 << 20


def fused_attention_available(q: mx.array, spec: AttentionSpec) -> bool:
    """MLX attends over plain rows in one kernel that makes no score matrix: on a GPU."""
    return on_gpu() and spec.softcap is None and not spec.slopes


def prepare_with_kernels(
    prepare: Callable[..., Any], q: mx.array, k: mx.array | None, step: Step
) -> tuple[mx.array, mx.array] | None:
    """``prepare`` of q and k in one launch, or None where the kernel doesn't apply.

    ``prepare.rope_arguments(q, step)`` says what it is for that kernel, or None. The kernel has no
    gradient: only a cache, which nothing is trained through, may call this.
    """
    arguments = getattr(prepare, "rope_arguments", None)
    if k is None or arguments is None or not on_metal() or not rope_supported(q, k):
        return None
    given = arguments(q, step)
    return None if given is None else rope(q, k, **given)


def encode_with_kernels(
    prepare: Callable[..., Any],
    q: mx.array,
    k: mx.array | None,
    v: mx.array | None,
    step: Step,
    formats: tuple[RowFormat, RowFormat],
) -> tuple[mx.array, Rows, Rows] | None:
    """``prepare`` of q and k, and k and v in the cache's formats, all in one launch; or None."""
    keys, values = formats
    arguments = getattr(prepare, "rope_arguments", None)
    if k is None or v is None or arguments is None or not on_metal():
        return None
    if keys.bits is None or values.bits is None or not rope_supported(q, k, v):
        return None
    given = arguments(q, step)
    if given is None or (keys.group_size, keys.rotate) != (values.group_size, values.rotate):
        return None
    bits: dict[str, Any] = {"key_bits": keys.bits, "value_bits": values.bits}
    return rope_quantize(q, k, v, group_size=keys.group_size, rotate=keys.rotate, **bits, **given)


def attend_with_kernels(
    q: mx.array,
    parts: Sequence[Part],
    *,
    spec: AttentionSpec,
    step: Step,
    sinks: mx.array | None,
    expand: Expand | None,
) -> mx.array | None:
    """Attention [B, H, T, Dv] by the project's Metal kernels, or None where they don't apply."""
    if not on_metal() or not parts or spec.coarse_slopes is not None:
        return None
    few = step.count <= MAX_QUERIES
    joined = _joined(parts) if spec.only_near or few else None
    if joined is None:
        return None
    keys, values, length, first = joined  # row 0 of the stretch is row ``first`` of the sequence
    if expand is not None:
        expanded = _expanded(q, slice_rows(keys, 0, length), expand)
        if expanded is None:
            return None
        keys, values = expanded
    value_dim = spec.value_dim if values is None else None
    turned = isinstance(keys, QuantizedRows) and keys.rotated
    if turned and value_dim is not None and not split_by_blocks(keys, value_dim):
        return None
    starts, mask = None, None
    if step.left_padding is not None:
        starts = [max(0, padding - first) for padding in step.left_padding]
    if not spec.only_near:
        rows, positions = mx.arange(first, first + length)[None], step.query_positions
        rows = rows if step.padding is None else rows - step.padding
        mask = visible(spec, positions, rows)
    attend = attention_decode if few else attention_prefill
    return attend(
        q,
        keys,
        values,
        lengths=[length] * q.shape[0],
        longest=length,
        scale=spec.scale,
        window=spec.window if spec.only_near else None,
        sinks=sinks,
        softcap=spec.softcap,
        slopes=mx.array(spec.slopes) if spec.slopes else None,
        mask=mask,
        starts=starts,
        value_dim=value_dim,
    )


def _joined(parts: Sequence[Part]) -> tuple[Rows, Rows | None, int, int] | None:
    """(keys, values, filled rows, the sequence's row in slot 0) of parts in one format."""
    if len(parts) == 1 and parts[0].buffer is not None:
        buffer = parts[0].buffer
        filled = buffer.slot + parts[0].count
        return buffer.keys, buffer.values, filled, parts[0].start - buffer.slot
    keys = _concatenated([part.keys for part in parts])
    if keys is None or any(a.stop != b.start for a, b in pairwise(parts)):
        return None
    count = sum(part.count for part in parts)
    if parts[0].values is None:
        return keys, None, count, parts[0].start
    values = _concatenated([part.values for part in parts if part.values is not None])
    return None if values is None else (keys, values, count, parts[0].start)


def _concatenated(rows: Sequence[Rows]) -> Rows | None:
    """Rows of one format one after the other; None if their formats differ."""
    formats = {
        (r.bits, r.group_size, r.rotated) if isinstance(r, QuantizedRows) else None for r in rows
    }
    if len(formats) > 1:
        return None
    if len(rows) == 1:
        return rows[0]
    return with_array(rows[0], mx.concatenate([array_of(r) for r in rows], axis=2))


def _expanded(q: mx.array, rows: Rows, expand: Expand) -> tuple[mx.array, mx.array] | None:
    count, heads = rows.shape[2], q.shape[1]
    if 2 * q.shape[0] * heads * count * q.shape[-1] * q.itemsize > EXPANDED_BYTES:
        return None
    return expand(kv_dequantize(rows) if isinstance(rows, QuantizedRows) else rows)
