"""Rotary positions for queries and keys in one launch, with the q/k norm folded in."""

from __future__ import annotations

from typing import NamedTuple, Required, TypedDict, Unpack

import mlx.core as mx

from mlxtx.errors import MlxtxError

from . import dispatch
from .kv_quantize import (
    KERNEL_TYPES,
    QuantizedRows,
    check_format,
    kv_quantize_reference,
    rotation_block,
    row_words,
)
from .source import integers, metal_kernel, numbers, unused


class HeadNorm(NamedTuple):
    """RMSNorm over the channels of a head: x / sqrt(mean(x^2) + eps) * (weight + offset)."""

    weight: mx.array | None  # [D]
    eps: float = 1e-6
    offset: float = 0.0  # 1.0 where the checkpoint stores weight - 1


Norm = HeadNorm | tuple[mx.array | None, float, float]


class RopeOptions(TypedDict, total=False):
    """The keyword arguments of a rotation; ``rope`` says what each one means."""

    inverse_frequencies: Required[mx.array]
    offsets: Required[mx.array]
    interleaved: bool
    rotated_dims: int | None
    amplitude: float
    q_norm: Norm | None
    k_norm: Norm | None


def rope(q: mx.array, k: mx.array, **options: Unpack[RopeOptions]) -> tuple[mx.array, mx.array]:
    """Normalise (if asked) and rotate q [B, H, T, D] and k [B, K, T, D]; any strides.

    inverse_frequencies: [rotated_dims / 2] float32; angle = position * inverse_frequencies.
    offsets: [B] int32, row t stands at offsets + t; or [B, T], each row's own position.
    interleaved: channels (2i, 2i + 1) turn together; otherwise (i, i + rotated_dims / 2).
    rotated_dims: leading channels that turn (default all D); the rest pass through.
    amplitude: factor on cosine and sine (the attention factor of YaRN and LongRoPE).
    q_norm, k_norm: (weight [D] or None, eps, offset), an RMSNorm over each head before the turn.

    Computed in float32 (float64 for float64), rounded once. Source: Su et al. 2021,
    arXiv:2104.09864.
    """
    check_rope(q, options)
    way = dispatch.choose("rope", supported=supports(q, k))
    return (launch if way == "kernel" else rope_reference)(q, k, **options)


def rope_reference(
    q: mx.array,
    k: mx.array,
    *,
    inverse_frequencies: mx.array,
    offsets: mx.array,
    interleaved: bool = False,
    rotated_dims: int | None = None,
    amplitude: float = 1.0,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> tuple[mx.array, mx.array]:
    """``rope`` in plain mx operations."""
    precision = mx.float64 if q.dtype == mx.float64 else mx.float32
    positions = offsets.reshape(offsets.shape[0], -1)
    if offsets.ndim == 1:
        positions = positions + mx.arange(q.shape[2])  # [B, T]
    angle = positions[:, None, :, None].astype(precision) * inverse_frequencies  # [B, 1, T, R/2]
    cosine, sine = mx.cos(angle) * amplitude, mx.sin(angle) * amplitude
    dims = rotated_dims or q.shape[-1]

    def turn(x: mx.array, norm: Norm | None) -> mx.array:
        dtype = x.dtype
        x = _normalise(x.astype(precision), norm)
        rotated, rest = x[..., :dims], x[..., dims:]
        if interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated[..., : dims // 2], rotated[..., dims // 2 :]
        pair = [first * cosine - second * sine, first * sine + second * cosine]
        if interleaved:
            rotated = mx.stack(pair, axis=-1).reshape(rotated.shape)
        else:
            rotated = mx.concatenate(pair, axis=-1)
        return mx.concatenate([rotated, rest], axis=-1).astype(dtype)

    return turn(q, q_norm), turn(k, k_norm)


def rope_quantize(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    key_bits: int,
    value_bits: int,
    group_size: int,
    rotate: bool = False,
    **options: Unpack[RopeOptions],
) -> tuple[mx.array, QuantizedRows, QuantizedRows]:
    """``rope`` and, in the same launch, the codes of the new rows for the cache.

    Returns the turned queries [B, H, T, D] and k [B, K, T, D], v [B, K, T, Dv] as QuantizedRows;
    k is rounded to its dtype before it is quantized, so that both forms give the same codes.
    ``rotate``: see ``kv_quantize``; the queries are not turned (attention does that).
    """
    check_rope(q, options)
    check_format(key_bits, group_size)
    check_format(value_bits, group_size)
    way = dispatch.choose("rope_quantize", supported=supports(q, k, v))
    return (launch_quantize if way == "kernel" else rope_quantize_reference)(
        q,
        k,
        v,
        key_bits=key_bits,
        value_bits=value_bits,
        group_size=group_size,
        rotate=rotate,
        **options,
    )


def rope_quantize_reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    key_bits: int,
    value_bits: int,
    group_size: int,
    rotate: bool = False,
    **options: Unpack[RopeOptions],
) -> tuple[mx.array, QuantizedRows, QuantizedRows]:
    """``rope_quantize`` in plain mx operations."""
    q, k = rope_reference(q, k, **options)
    return (
        q,
        kv_quantize_reference(k, bits=key_bits, group_size=group_size, rotate=rotate),
        kv_quantize_reference(v, bits=value_bits, group_size=group_size, rotate=rotate),
    )


def check_rope(q: mx.array, options: RopeOptions) -> None:
    """Raise for a frequency table or positions that do not fit the queries."""
    inverse_frequencies, offsets = options["inverse_frequencies"], options["offsets"]
    dims = options.get("rotated_dims") or q.shape[-1]
    if dims % 2 or dims > q.shape[-1] or inverse_frequencies.shape != (dims // 2,):
        raise MlxtxError(
            f"rope turns {dims} of {q.shape[-1]} channels with {inverse_frequencies.shape} "
            "frequencies: it needs an even number of channels and one frequency for each pair"
        )
    if offsets.shape not in ((q.shape[0],), (q.shape[0], q.shape[2])):
        raise MlxtxError(f"rope offsets have shape {offsets.shape}; needs [B] or [B, T]")


def _normalise(x: mx.array, norm: Norm | None) -> mx.array:
    if norm is None:
        return x
    weight, eps, offset = norm
    x = x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps)
    return x if weight is None else x * (weight.astype(x.dtype) + offset)


_INPUTS = ("q", "k", "q_weight", "k_weight", "offsets", "frequencies", "sizes", "factors")


def available() -> bool:
    """Whether the kernels can run on the current device."""
    return dispatch.on_metal()


def launch(q: mx.array, k: mx.array, **options: Unpack[RopeOptions]) -> tuple[mx.array, mx.array]:
    """The kernel of ``rope``, whatever the table says."""
    batch, heads, count, dim = q.shape
    rows = batch * (heads + k.shape[1]) * count
    q_out, k_out = metal_kernel(
        "rope", _INPUTS, ("q_out", "k_out"), contiguous=False, helpers=("rope_row",)
    )(
        inputs=[q, k, *_shared(q, k, options)],
        template=[
            ("T", q.dtype),
            ("D", dim),
            ("ROTATED", options.get("rotated_dims") or dim),
            ("INTERLEAVED", options.get("interleaved", False)),
        ],
        grid=(128, -(-rows // 4), 1),
        threadgroup=(128, 1, 1),
        output_shapes=[q.shape, k.shape],
        output_dtypes=[q.dtype, k.dtype],
    )
    return q_out, k_out


def launch_quantize(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    key_bits: int,
    value_bits: int,
    group_size: int,
    rotate: bool = False,
    **options: Unpack[RopeOptions],
) -> tuple[mx.array, QuantizedRows, QuantizedRows]:
    """The kernel of ``rope_quantize``, whatever the table says."""
    batch, heads, count, dim = q.shape
    value_dim = v.shape[-1]
    padded = [d + -d % group_size for d in (dim, value_dim)]
    leading = (batch, k.shape[1], count)
    shapes = [
        (*leading, row_words(p, bits, group_size, q.dtype.size))
        for p, bits in zip(padded, (key_bits, value_bits), strict=True)
    ]
    q_out, keys, values = metal_kernel(
        "rope_quantize",
        ("v", *_INPUTS),
        ("q_out", "key_words", "value_words"),
        contiguous=False,
        helpers=("rope_row", "quantize_row"),
    )(
        inputs=[v, q, k, *_shared(q, k, options)],
        template=[
            ("T", q.dtype),
            ("D", dim),
            ("DV", value_dim),
            ("ROTATED", options.get("rotated_dims") or dim),
            ("INTERLEAVED", options.get("interleaved", False)),
            ("KEY_BITS", key_bits),
            ("VALUE_BITS", value_bits),
            ("GROUP", group_size),
            ("KEY_PADDED", padded[0]),
            ("VALUE_PADDED", padded[1]),
            ("ROTATE", rotate),
            ("KEY_BLOCK", rotation_block(dim)),
            ("VALUE_BLOCK", rotation_block(value_dim)),
        ],
        grid=(128, -(-batch * (heads + 2 * k.shape[1]) * count // 4), 1),
        threadgroup=(128, 1, 1),
        output_shapes=[q.shape, *shapes],
        output_dtypes=[q.dtype, mx.uint32, mx.uint32],
    )
    return (
        q_out,
        QuantizedRows(keys, key_bits, group_size, dim, q.dtype, rotate),
        QuantizedRows(values, value_bits, group_size, value_dim, q.dtype, rotate),
    )


def supports(*arrays: mx.array) -> bool:
    """Whether the kernels take rows of these types."""
    return len({a.dtype for a in arrays}) == 1 and arrays[0].dtype in KERNEL_TYPES


def _shared(q: mx.array, k: mx.array, options: RopeOptions) -> list[mx.array]:
    """The inputs both kernels take after their rows, in the order of ``_INPUTS``."""
    offsets = options["offsets"]
    weights, kinds, factors = [], [], [options.get("amplitude", 1.0)]
    for norm in (options.get("q_norm"), options.get("k_norm")):
        weight, eps, offset = norm if norm is not None else (None, 0.0, 0.0)
        weights.append(unused(mx.float32) if weight is None else weight)
        kinds.append(0 if norm is None else 1 if weight is None else 2)
        factors += [eps, offset]
    return [
        *weights,
        offsets if offsets.dtype == mx.int32 else offsets.astype(mx.int32),
        options["inverse_frequencies"],
        integers(*(q.shape[0], q.shape[1], k.shape[1], q.shape[2], int(offsets.ndim == 2)), *kinds),
        numbers(*factors),
    ]
