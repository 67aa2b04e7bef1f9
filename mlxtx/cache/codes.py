"""One slice of rows as attention needs it: scores of queries over it, and products with its values.

Codes are decoded for one slice at a time. Keys that were turned by a Hadamard matrix stay turned
(the queries are turned alike), and products of turned values are turned back: both are fewer rows.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlxtx.cache.numerics import on_gpu
from mlxtx.cache.rows import Rows
from mlxtx.cache.segment import Part
from mlxtx.metal_kernels.kv_quantize import (
    QuantizedRows,
    kv_dequantize,
    rotate_rows,
    rotation_block,
)

FEW_QUERIES = 8  # up to here a GPU multiplies with the codes as they are


class SliceReader:
    """Keys and values of a part, decoded when first used."""

    def __init__(
        self,
        part: Part,
        value_dim: int | None,
        precision: mx.Dtype,
        expand: Callable[[mx.array], tuple[mx.array, mx.array]] | None,
    ):
        self.precision = precision
        keys, values = part.keys, part.values
        if expand is not None:
            whole = kv_dequantize(keys) if isinstance(keys, QuantizedRows) else keys
            keys, values = expand(whole)
        self.value_dim = value_dim if values is None else None
        if isinstance(keys, QuantizedRows) and keys.rotated and self.value_dim:
            # A block of the rotation may reach across the values' end.
            keys = (
                keys if split_by_blocks(keys, self.value_dim) else kv_dequantize(keys, mx.float32)
            )
        self._keys = _Decoded(keys, precision)
        self._values = self._keys if values is None else _Decoded(values, precision)

    def scores(self, q: mx.array) -> mx.array:
        """q [B, K, G, T, D] times the keys: [B, K, G, T, S]."""
        return self._keys.dot(q)

    def product(self, weights: mx.array) -> mx.array:
        """Weights [B, K, G, T, S] times the values: [B, K, G, T, Dv]."""
        return self._values.weighed(weights, self.value_dim)


class _Decoded:
    """Rows [B, K, S, D], decoded when many queries want them and multiplied as codes for few."""

    def __init__(self, rows: Rows, precision: mx.Dtype):
        self.rows, self.precision = rows, precision
        self._decoded: mx.array | None = None
        bits = rows.bits if isinstance(rows, QuantizedRows) else 0
        self.unpacked = not on_gpu() and bits in (2, 4, 8)

    def decoded(self) -> mx.array:
        if self._decoded is None:
            rows = self.rows
            if not isinstance(rows, QuantizedRows):
                self._decoded = rows.astype(self.precision)
            elif self.unpacked:
                self._decoded = unpack(rows).astype(self.precision)
            else:
                plain = mx.dequantize(
                    rows.codes,
                    rows.scales.astype(mx.float32),
                    rows.biases.astype(mx.float32),
                    group_size=rows.group_size,
                    bits=rows.bits,
                )
                self._decoded = plain.astype(self.precision)
        return self._decoded

    def dot(self, q: mx.array) -> mx.array:
        rows, shape = self.rows, q.shape
        if isinstance(rows, QuantizedRows):
            q = rotate_rows(q) if rows.rotated else q
            q = _pad(q, rows.padded_dim)
            if self._few(q) and (on_gpu() or self.unpacked):
                flat = q.flatten(2, 3)
                product = self._multiplied(flat, True) if on_gpu() else code_scores(flat, rows)
                return product.reshape(*shape[:4], -1)
        scores = q.flatten(2, 3) @ self.decoded().swapaxes(-1, -2)
        return scores.reshape(*shape[:4], -1)

    def weighed(self, weights: mx.array, value_dim: int | None) -> mx.array:
        rows, shape = self.rows, weights.shape
        flat = weights.flatten(2, 3)
        if isinstance(rows, QuantizedRows) and self._few(weights):
            out = self._multiplied(flat, False)
        else:
            values = self.decoded()
            if value_dim is not None and not isinstance(rows, QuantizedRows):
                values = values[..., :value_dim]
            out = flat @ values
        out = out.reshape(*shape[:4], -1)
        if isinstance(rows, QuantizedRows):
            out = out[..., : rows.dim]
            out = rotate_rows(out) if rows.rotated else out
        return out if value_dim is None else out[..., :value_dim]

    def _few(self, x: mx.array) -> bool:
        return x.shape[2] * x.shape[3] <= FEW_QUERIES and self.precision == mx.float32

    def _multiplied(self, x: mx.array, transpose: bool) -> mx.array:
        """x times the codes as they are: on a CPU in float32, which is the fastest there."""
        rows = self.rows
        assert isinstance(rows, QuantizedRows)
        dtype = rows.dtype if on_gpu() else mx.float32
        return mx.quantized_matmul(
            x.astype(dtype),
            rows.codes,
            rows.scales.astype(dtype),
            rows.biases.astype(dtype),
            transpose=transpose,
            group_size=rows.group_size,
            bits=rows.bits,
        ).astype(self.precision)


def split_by_blocks(rows: Rows, value_dim: int) -> bool:
    """Whether the first channels of rotated rows are whole blocks of the rotation."""
    return value_dim % rotation_block(rows.shape[-1]) == 0


def unpack(rows: QuantizedRows) -> mx.array:
    """Rows [B, K, S, P] in float32 from codes of 2, 4 or 8 bits. ``mx.dequantize`` on a CPU
    handles one number at a time; these are plain array operations."""
    scales, biases = (a.astype(mx.float32)[..., None] for a in (rows.scales, rows.biases))
    planes = [codes * scales + biases for codes in code_planes(rows)]
    return planes[0].flatten(-2) if len(planes) == 1 else mx.stack(planes, axis=-1).flatten(-3)


def code_planes(rows: QuantizedRows) -> list[mx.array]:
    """The codes of 2, 4 or 8 bits as numbers [B, K, S, groups, channels]: an array of the first
    codes of every byte, one of the second ones ..."""
    octets = rows.codes.view(mx.uint8)  # [B, K, S, P * bits / 8]
    planes, mask = 8 // rows.bits, (1 << rows.bits) - 1
    shape = (*rows.scales.shape, -1)
    if planes == 1:
        return [octets.astype(mx.float32).reshape(shape)]
    shifted = [octets if p == 0 else octets >> (p * rows.bits) for p in range(planes)]
    shifted[:-1] = [codes & mask for codes in shifted[:-1]]
    return [codes.astype(mx.float32).reshape(shape) for codes in shifted]


def code_scores(q: mx.array, rows: QuantizedRows) -> mx.array:
    """Scores [B, K, R, S] of a few queries [B, K, R, P]: by group, q codes * scale + sum(q) bias,
    so that scales touch one number a group and not every channel."""
    scales, biases = (
        a.astype(mx.float32).swapaxes(-1, -2)[:, :, :, None] for a in (rows.scales, rows.biases)
    )  # [B, K, groups, 1, S]
    planes = code_planes(rows)
    grouped = q.reshape(*q.shape[:3], rows.scales.shape[-1], -1).swapaxes(2, 3)  # [B, K, g, R, c]
    products = [
        grouped[..., number :: len(planes)] @ codes.transpose(0, 1, 3, 4, 2)
        for number, codes in enumerate(planes)
    ]
    total = scales * sum(products[1:], products[0]) + biases * grouped.sum(axis=-1, keepdims=True)
    return total[:, :, 0] if total.shape[2] == 1 else total.sum(axis=2)


def _pad(x: mx.array, width: int) -> mx.array:
    missing = width - x.shape[-1]
    return x if not missing else mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
