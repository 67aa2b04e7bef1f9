"""Cache rows as codes, scales and biases: affine quantization by groups along the channels."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlxtx.errors import MlxtxError

from . import dispatch
from .source import integers, metal_kernel

KERNEL_TYPES = (mx.float16, mx.bfloat16, mx.float32)
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


class QuantizedRows(NamedTuple):
    """Rows of a cache as codes. A row is one run of 32-bit words: the codes of its P channels (the
    width rounded up to whole groups) as ``mx.quantize`` lays them out, then the scale and the bias
    of each group side by side. So a new row is one write into the cache, and one stretch to read."""

    words: mx.array  # [..., row_words(...)] uint32
    bits: int
    group_size: int
    dim: int  # channels of a row, before padding
    dtype: mx.Dtype  # of scales and biases, and of the rows that come back
    rotated: bool = False  # rows went through rotate_rows before quantization

    @property
    def padded_dim(self) -> int:
        """Channels as stored, whole groups of them."""
        return self.dim + -self.dim % self.group_size

    @property
    def codes(self) -> mx.array:
        """[..., P * bits / 32] uint32, a view."""
        return self.words[..., : self.padded_dim * self.bits // 32]

    @property
    def scales(self) -> mx.array:
        """[..., P / group_size], a view."""
        return self._scales_and_biases[..., ::2]

    @property
    def biases(self) -> mx.array:
        """[..., P / group_size], a view."""
        return self._scales_and_biases[..., 1::2]

    @property
    def _scales_and_biases(self) -> mx.array:
        return self.words[..., self.padded_dim * self.bits // 32 :].view(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rows these codes stand for."""
        return (*self.words.shape[:-1], self.dim)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    def rows(self, start: int, stop: int) -> QuantizedRows:
        """Rows start to stop (the second axis from the end)."""
        part = (slice(None),) * (self.words.ndim - 2) + (slice(start, stop),)
        return self._replace(words=self.words[part])


def row_words(dim: int, bits: int, group_size: int, itemsize: int) -> int:
    """32-bit words of one quantized row whose scales have ``itemsize`` bytes."""
    groups = -(-dim // group_size)
    return groups * (group_size * bits // 8 + 2 * itemsize) // 4


def pack_row(codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """The words of rows from what ``mx.quantize`` returns."""
    pairs = mx.stack([scales, biases], axis=-1).flatten(-2)
    return mx.concatenate([codes, pairs.view(mx.uint32)], axis=-1)


def kv_quantize(
    rows: mx.array, *, bits: int, group_size: int, rotate: bool = False
) -> QuantizedRows:
    """Quantize rows ``[..., D]`` (two axes or more) by groups of ``group_size`` channels.

    D is padded with zeros to whole groups, so head dims 80 and 96 work with any group size. With
    ``rotate`` each row is turned by an orthonormal Hadamard matrix first, which spreads outliers
    over the channels; attention turns the queries the same way and its result back.
    """
    check_format(bits, group_size)
    way = dispatch.choose("kv_quantize", supported=rows.dtype in KERNEL_TYPES)
    function = launch if way == "kernel" else kv_quantize_reference
    return function(rows, bits=bits, group_size=group_size, rotate=rotate)


def available() -> bool:
    """Whether the kernel can run on the current device."""
    return dispatch.on_metal()


def launch(rows: mx.array, *, bits: int, group_size: int, rotate: bool = False) -> QuantizedRows:
    """The kernel, whatever the table says."""
    dim = rows.shape[-1]
    padded = dim + -dim % group_size
    count = rows.size // dim
    leading = rows.shape[:-1]
    kernel = metal_kernel("kv_quantize", ("rows", "sizes"), ("words",), helpers=("quantize_row",))
    (words,) = kernel(
        inputs=[rows, integers(count)],
        template=[
            ("T", rows.dtype),
            ("DIM", dim),
            ("PADDED", padded),
            ("BITS", bits),
            ("GROUP", group_size),
            ("ROTATE", rotate),
            ("BLOCK", rotation_block(dim)),
        ],
        grid=(128, -(-count // 4), 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(*leading, row_words(dim, bits, group_size, rows.dtype.size))],
        output_dtypes=[mx.uint32],
    )
    return QuantizedRows(words, bits, group_size, dim, rows.dtype, rotate)


def kv_quantize_reference(
    rows: mx.array, *, bits: int, group_size: int, rotate: bool = False
) -> QuantizedRows:
    """``kv_quantize`` by ``mx.quantize``."""
    dim = rows.shape[-1]
    if rotate:
        rows = rotate_rows(rows.astype(mx.float32)).astype(rows.dtype)
    padding = -dim % group_size
    if padding:
        rows = mx.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, padding)])
    words = pack_row(*mx.quantize(rows, group_size=group_size, bits=bits))
    return QuantizedRows(words, bits, group_size, dim, rows.dtype, rotate)


def kv_dequantize(quantized: QuantizedRows, dtype: mx.Dtype | None = None) -> mx.array:
    """The rows ``[..., D]`` the codes stand for, turned back if they were rotated."""
    rows = mx.dequantize(
        quantized.codes,
        quantized.scales.astype(dtype) if dtype else quantized.scales,
        quantized.biases.astype(dtype) if dtype else quantized.biases,
        group_size=quantized.group_size,
        bits=quantized.bits,
    )[..., : quantized.dim]
    return rotate_rows(rows) if quantized.rotated else rows


def rotation_block(dim: int) -> int:
    """Channels that one Hadamard block mixes: the largest power of two that divides ``dim``."""
    return dim & -dim


def rotate_rows(rows: mx.array, block: int | None = None) -> mx.array:
    """Rows ``[..., D]`` times a block-diagonal orthonormal Hadamard matrix, its own inverse.

    ``block``: channels a block mixes, when D is a part of the rows that were turned.
    """
    dim = rows.shape[-1]
    block = block or rotation_block(dim)
    if block == 1:
        return rows
    blocks = rows.reshape(*rows.shape[:-1], dim // block, block)
    return mx.hadamard_transform(blocks, scale=block**-0.5).reshape(rows.shape)


def turned_block(keys: object, values: object, value_dim: int) -> int | None:
    """The Hadamard block that attention's result must go back through; None if values lie plain.

    ``values`` None: a latent cache, whose values are the leading channels of the keys.
    """
    side = keys if values is None else values
    if not isinstance(side, QuantizedRows) or not side.rotated:
        return None
    block = rotation_block(side.dim)
    if value_dim % block:
        raise MlxtxError(
            f"{value_dim} value channels do not hold whole rotated blocks of {block}: "
            "quantize this latent cache without rotation"
        )
    return block


def check_format(bits: int, group_size: int) -> None:
    """Raise if the cache cannot be quantized to these bits and groups."""
    if bits not in BITS:
        raise MlxtxError(f"a quantized cache has {', '.join(map(str, BITS))} bits, not {bits}")
    if group_size not in GROUP_SIZES:
        raise MlxtxError(f"a quantized cache has groups of 32, 64 or 128, not {group_size}")
