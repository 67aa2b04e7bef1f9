"""Numbers as attention over a cache computes with them."""

from __future__ import annotations

import mlx.core as mx

# log2(e), and the polynomial for 2**f on [-1/2, 1/2] (least squares, relative error 1e-7).
_LOG2_E = 1.4426950408889634
_TERMS = (0.0013400432, 0.0096760371, 0.0555032721, 0.2402210736, 0.6931472067, 1.0000000755)
_ROUND = 12582912.0  # 1.5 * 2**23: adding it to a float32 leaves a whole number


def precision_of(x: mx.array) -> mx.Dtype:
    """Sums run in float32, and in float64 for float64."""
    return mx.float64 if x.dtype == mx.float64 else mx.float32


def on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def exp(x: mx.array) -> mx.array:
    """e**x for x of 0 and below; 0 below -87. MLX's own exp takes five times as long on the CPU,
    where it decides how long a prompt takes; there this one splits off the power of two."""
    if x.dtype != mx.float32 or on_gpu() or x.size < 4096:
        return mx.exp(x)
    result: mx.array = _exp(x)  # type: ignore[assignment]
    return result


@mx.custom_function
def _exp(x: mx.array) -> mx.array:
    x = mx.maximum(x * _LOG2_E, -127.0)  # whole -127 gives a zero exponent, and 0
    whole = (x + _ROUND) - _ROUND
    fraction = x - whole
    power = fraction * _TERMS[0] + _TERMS[1]
    for term in _TERMS[2:]:
        power = power * fraction + term
    exponent = (whole.astype(mx.int32) + 127) << 23
    return power * exponent.view(mx.float32)


@_exp.vjp
def _exp_vjp(x, cotangent, output):
    """Rounding has no useful derivative; the exponential is its own."""
    return cotangent * output
