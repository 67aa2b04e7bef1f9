"""The plain-mx references against float64 numpy, on every machine."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlxtx.metal_kernels import attention_reference as module
from mlxtx.metal_kernels.attention_decode import attention_decode
from mlxtx.metal_kernels.attention_prefill import attention_prefill
from mlxtx.metal_kernels.kv_quantize import kv_dequantize, kv_quantize, rotate_rows
from mlxtx.metal_kernels.rope import rope

from .numpy_attention import attention_float64


def random_case(seed: int, *, batch=2, heads=4, kv_heads=2, count=3, rows=37, dim=16):
    draw = np.random.default_rng(seed)
    q = draw.normal(size=(batch, heads, count, dim)).astype(np.float32)
    k = draw.normal(size=(batch, kv_heads, rows, dim)).astype(np.float32)
    v = draw.normal(size=(batch, kv_heads, rows, dim)).astype(np.float32)
    return draw, q, k, v


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 5},
        {"softcap": 2.0},
        {"sinks": True},
        {"slopes": True},
        {"mask": True},
        {"window": 5, "softcap": 3.0, "sinks": True, "starts": [3, 0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("slices", [False, True])
def test_attention_reference(options, slices, monkeypatch):
    if slices:  # the loop over bounded slices must not change the result
        monkeypatch.setattr(module, "ROWS_AT_A_TIME", 7)
        monkeypatch.setattr(module, "SCORES_AT_A_TIME", 8 * 7)
    draw, q, k, v = random_case(3)
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = draw.normal(size=4).astype(np.float32)
    if options.get("slopes"):
        options["slopes"] = draw.uniform(0.1, 0.5, size=4).astype(np.float32)
    if options.get("mask"):
        options["mask"] = draw.random((2, 1, 3, 37)) > 0.4
        options["mask"][0, 0, 1] = False  # a row that sees nothing
    expected = attention_float64(q, k, v, lengths=[37, 20], scale=0.3, **options)
    given = {n: mx.array(a) if isinstance(a, np.ndarray) else a for n, a in options.items()}
    found = attention_decode(
        mx.array(q), mx.array(k), mx.array(v), lengths=[37, 20], scale=0.3, **given
    )
    assert np.abs(np.array(found) - expected).max() < 2e-6
    if "mask" in options:
        assert not np.array(found)[0, :, 1].any()


def test_latent_values_are_the_first_channels_of_the_keys():
    _, q, k, _ = random_case(4)
    expected = attention_float64(q, k, k[..., :8], lengths=[9, 37], scale=0.3)
    found = attention_decode(
        mx.array(q), mx.array(k), None, lengths=mx.array([9, 37]), scale=0.3, value_dim=8
    )
    assert found.shape == (2, 4, 3, 8)
    assert np.abs(np.array(found) - expected).max() < 2e-6


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 96])
def test_quantized_attention_equals_attention_over_dequantized_rows(dim, rotate):
    _, q, k, v = random_case(5, dim=dim)
    keys = kv_quantize(mx.array(k), bits=6, group_size=64, rotate=rotate)
    values = kv_quantize(mx.array(v), bits=4, group_size=32, rotate=rotate)
    expected = attention_float64(
        q,
        np.array(kv_dequantize(keys)),
        np.array(kv_dequantize(values)),
        lengths=[37, 12],
        scale=0.1,
    )
    found = attention_prefill(mx.array(q), keys, values, lengths=[37, 12], scale=0.1)
    assert np.abs(np.array(found) - expected).max() < 5e-6


def test_rotation_is_its_own_inverse_and_lowers_the_error_of_an_outlier_channel():
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(8, 128)).astype(np.float32)
    rows[:, 5] *= 30
    x = mx.array(rows)
    twice = rotate_rows(rotate_rows(x))
    assert np.abs(np.array(twice) - rows).max() < 2e-5

    def error(rotate):
        quantized = kv_quantize(x, bits=4, group_size=32, rotate=rotate)
        return float(mx.abs(kv_dequantize(quantized) - x).max())

    assert error(True) < error(False) * 0.8


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated_dims", [32, 16])
def test_rope_reference(interleaved, rotated_dims):
    draw = np.random.default_rng(1)
    q = draw.normal(size=(2, 4, 3, 32)).astype(np.float32)
    k = draw.normal(size=(2, 1, 3, 32)).astype(np.float32)
    weight = draw.normal(size=32).astype(np.float32)
    inverse = (1e4 ** (-np.arange(rotated_dims // 2) / (rotated_dims // 2))).astype(np.float32)
    offsets = np.array([5, 1000], dtype=np.int32)
    found_q, found_k = rope(
        mx.array(q),
        mx.array(k),
        inverse_frequencies=mx.array(inverse),
        offsets=mx.array(offsets),
        interleaved=interleaved,
        rotated_dims=rotated_dims,
        amplitude=1.25,
        q_norm=(mx.array(weight), 1e-5, 1.0),
    )
    angle = ((offsets[:, None] + np.arange(3)).astype(np.float32)[..., None] * inverse)[:, None]
    turn = 1.25 * np.exp(1j * angle.astype(np.float64))
    normed = q / np.sqrt((q.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * (weight + 1)
    for found, x in ((found_q, normed), (found_k, k)):
        half = rotated_dims // 2
        first, second = (
            (slice(0, rotated_dims, 2), slice(1, rotated_dims, 2))
            if interleaved
            else (
                slice(0, half),
                slice(half, rotated_dims),
            )
        )
        turned = (x[..., first] + 1j * x[..., second]) * turn
        expected = np.array(x, dtype=np.float64)
        expected[..., first], expected[..., second] = turned.real, turned.imag
        assert np.abs(np.array(found) - expected).max() < 2e-6 * np.abs(expected).max() * 2
