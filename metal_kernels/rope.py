"""Rotary positions for queries and keys in one launch, with the q/k norm folded in."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlxtx.errors import MlxtxError

from .kv_quantize import QuantizedRows, kv_quantize_reference


class HeadNorm(NamedTuple):
    """RMSNorm over the channels of a head: x / sqrt(mean(x^2) + eps) * (weight + offset)."""

    weight: mx.array | None  # [D]
    eps: float = 1e-6
    offset: float = 0.0  # 1.0 where the checkpoint stores weight - 1


Norm = HeadNorm | tuple[mx.array | None, float, float]


def rope(
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
    check_rope(q, inverse_frequencies, offsets, rotated_dims)
    return rope_reference(
        q,
        k,
        inverse_frequencies=inverse_frequencies,
        offsets=offsets,
        interleaved=interleaved,
        rotated_dims=rotated_dims,
        amplitude=amplitude,
        q_norm=q_norm,
        k_norm=k_norm,
    )


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
        pair = (first * cosine - second * sine, first * sine + second * cosine)
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
    inverse_frequencies: mx.array,
    offsets: mx.array,
    key_bits: int,
    value_bits: int,
    group_size: int,
    interleaved: bool = False,
    rotated_dims: int | None = None,
    amplitude: float = 1.0,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> tuple[mx.array, QuantizedRows, QuantizedRows]:
    """``rope`` and, in the same launch, the codes of the new rows for the cache.

    Returns the turned queries [B, H, T, D] and k [B, K, T, D], v [B, K, T, Dv] as QuantizedRows;
    k is rounded to its dtype before it is quantized, so that both forms give the same codes.
    """
    check_rope(q, inverse_frequencies, offsets, rotated_dims)
    return rope_quantize_reference(
        q,
        k,
        v,
        inverse_frequencies=inverse_frequencies,
        offsets=offsets,
        key_bits=key_bits,
        value_bits=value_bits,
        group_size=group_size,
        interleaved=interleaved,
        rotated_dims=rotated_dims,
        amplitude=amplitude,
        q_norm=q_norm,
        k_norm=k_norm,
    )


def rope_quantize_reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    inverse_frequencies: mx.array,
    offsets: mx.array,
    key_bits: int,
    value_bits: int,
    group_size: int,
    interleaved: bool = False,
    rotated_dims: int | None = None,
    amplitude: float = 1.0,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> tuple[mx.array, QuantizedRows, QuantizedRows]:
    """``rope_quantize`` in plain mx operations."""
    q, k = rope_reference(
        q,
        k,
        inverse_frequencies=inverse_frequencies,
        offsets=offsets,
        interleaved=interleaved,
        rotated_dims=rotated_dims,
        amplitude=amplitude,
        q_norm=q_norm,
        k_norm=k_norm,
    )
    return (
        q,
        kv_quantize_reference(k, bits=key_bits, group_size=group_size),
        kv_quantize_reference(v, bits=value_bits, group_size=group_size),
    )


def check_rope(
    q: mx.array, inverse_frequencies: mx.array, offsets: mx.array, rotated_dims: int | None
) -> None:
    """Raise for a frequency table or positions that do not fit the queries."""
    dims = rotated_dims or q.shape[-1]
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
