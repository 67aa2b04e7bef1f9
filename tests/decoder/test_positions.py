"""Rotary tables and rotations against the papers' formulas in float64."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlxtx.cache import Step
from mlxtx.decoder.config import ConfigError, RopeConfig, RopeScaling, TemperatureConfig
from mlxtx.decoder.positions import (
    Rotary,
    alibi_slopes,
    query_temperature,
    sinusoidal_table,
    wavelengths,
)


def rotate_exactly(x: np.ndarray, positions: np.ndarray, table: np.ndarray, interleaved: bool):
    """RoPE of x [..., T, 2n] in float64, as complex numbers."""
    half = len(table)
    turned = x.astype(np.float64).copy()
    first = turned[..., 0 : 2 * half : 2] if interleaved else turned[..., :half]
    second = turned[..., 1 : 2 * half : 2] if interleaved else turned[..., half : 2 * half]
    z = (first + 1j * second) * np.exp(1j * positions[:, None] / table.astype(np.float64))
    if interleaved:
        turned[..., 0 : 2 * half : 2], turned[..., 1 : 2 * half : 2] = z.real, z.imag
    else:
        turned[..., :half], turned[..., half : 2 * half] = z.real, z.imag
    return turned


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [8, 16])
@pytest.mark.parametrize("offset", [0, 37])
def test_rotation_is_the_complex_one(interleaved, dims, offset):
    config = RopeConfig(dims=dims, base=500.0, interleaved=interleaved)
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 16)).astype(np.float32)
    got = np.array(Rotary(config)(mx.array(x), Step(5, offset)))
    positions = np.arange(offset, offset + 5)
    table = 500.0 ** (np.arange(0, dims, 2) / dims)
    np.testing.assert_allclose(got, rotate_exactly(x, positions, table, interleaved), atol=2e-5)


def test_tail_and_amplitude_touch_only_the_rotated_channels():
    scaling = RopeScaling(kind="yarn", factor=4.0, original_context=32, attention_factor=1.5)
    x = mx.random.normal((1, 2, 3, 12))
    tail = Rotary(RopeConfig(dims=8, scaling=scaling, tail=True))(x, Step(3, 5))
    head = Rotary(RopeConfig(dims=8, scaling=scaling))(
        mx.concatenate([x[..., 4:], x[..., :4]], axis=-1), Step(3, 5)
    )
    assert mx.array_equal(tail[..., :4], x[..., :4])
    np.testing.assert_allclose(np.array(tail[..., 4:]), np.array(head[..., :8]), atol=1e-6)
    norms = np.linalg.norm(np.array(tail[..., 4:]), axis=-1)
    np.testing.assert_allclose(
        norms, 1.5 * np.linalg.norm(np.array(x[..., 4:]), axis=-1), rtol=1e-5
    )


def test_padded_and_packed_rows_get_their_own_positions():
    rotary = Rotary(RopeConfig(dims=8))
    x = mx.random.normal((2, 1, 6, 8))
    padded = rotary(x, Step(6, 0, left_padding=[0, 4]))
    alone = rotary(x[1:, :, 4:], Step(2, 0))
    np.testing.assert_allclose(np.array(padded[1:, :, 4:]), np.array(alone), atol=1e-6)
    positions = mx.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]])
    packed = rotary(x, Step(6, 0, positions=positions))
    again = rotary(x[1:, :, 3:], Step(3, 0))
    np.testing.assert_allclose(np.array(packed[1:, :, 3:]), np.array(again), atol=1e-6)


def test_longrope_switches_with_the_length_of_each_row():
    short, long = tuple([1.0] * 4), tuple([3.0] * 4)
    scaling = RopeScaling(
        kind="longrope", original_context=8, short_factors=short, long_factors=long
    )
    config = RopeConfig(dims=8, scaling=scaling)
    assert np.allclose(wavelengths(config, 9), 3 * wavelengths(config, 8))
    x = mx.random.normal((2, 1, 10, 8))
    both = Rotary(config)(x, Step(10, 0, left_padding=[0, 6]))
    row = Rotary(config)(x[1:, :, 6:], Step(4, 0))
    np.testing.assert_allclose(np.array(both[1:, :, 6:]), np.array(row), atol=1e-5)
    # A prompt fed in chunks uses what its whole length asks for.
    whole = Rotary(config)(x[:1], Step(10, 0))
    chunk = Rotary(config)(x[:1, :, :4], Step(4, 0, length=10))
    np.testing.assert_allclose(np.array(whole[:, :, :4]), np.array(chunk), atol=1e-6)


def test_dynamic_scaling_grows_the_base_beyond_the_context():
    config = RopeConfig(
        dims=8, base=100.0, scaling=RopeScaling(kind="dynamic", factor=2.0, original_context=16)
    )
    exponents = np.arange(0, 8, 2) / 8
    np.testing.assert_allclose(wavelengths(config, 10), 100.0**exponents, rtol=1e-6)
    base = 100.0 * (2.0 * 40 / 16 - 1) ** (8 / 6)
    np.testing.assert_allclose(wavelengths(config, 40), base**exponents, rtol=1e-6)


def test_llama3_keeps_short_and_stretches_long_wavelengths():
    scaling = RopeScaling(
        kind="llama3",
        factor=8.0,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
        original_context=64,
    )
    plain = 10000.0 ** (np.arange(0, 32, 2) / 32)
    table = np.array(wavelengths(RopeConfig(dims=32, scaling=scaling)))
    waves = 2 * math.pi * plain
    np.testing.assert_allclose(table[waves < 16], plain[waves < 16], rtol=1e-6)
    np.testing.assert_allclose(table[waves > 64], 8 * plain[waves > 64], rtol=1e-6)
    between = (waves >= 16) & (waves <= 64)
    assert between.any()
    assert ((table > plain) & (table < 8 * plain))[between].all()


def test_proportional_rope_leaves_channels_still():
    scaling = RopeScaling(kind="proportional", turning=0.5)
    table = np.array(wavelengths(RopeConfig(dims=8, base=100.0, scaling=scaling)))
    np.testing.assert_allclose(table[:2], 100.0 ** (np.arange(0, 4, 2) / 8), rtol=1e-6)
    assert np.isinf(table[2:]).all()
    x = mx.random.normal((1, 1, 4, 8))
    y = Rotary(RopeConfig(dims=8, base=100.0, scaling=scaling))(x, Step(4, 3))
    np.testing.assert_allclose(np.array(y[..., 2:4]), np.array(x[..., 2:4]), atol=1e-6)


def test_alibi_slopes_of_any_head_count():
    np.testing.assert_allclose(alibi_slopes(8), [2.0 ** -(i + 1) for i in range(8)])
    six = alibi_slopes(6)
    np.testing.assert_allclose(six[:4], [2.0 ** (-2 * (i + 1)) for i in range(4)])
    np.testing.assert_allclose(six[4:], [2.0**-1, 2.0**-3])


def test_query_temperature_grows_in_steps():
    config = TemperatureConfig(beta=0.1, floor=4.0)
    got = np.array(query_temperature(config, Step(9, 0), mx.float32)).ravel()
    want = 1 + 0.1 * np.log1p(np.floor(np.arange(9) / 4))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_sinusoidal_table():
    table = np.array(sinusoidal_table(5, 8))
    rates = 10000.0 ** (-np.arange(4) / 3)
    np.testing.assert_allclose(table[:, :4], np.sin(np.arange(5)[:, None] * rates), atol=1e-6)
    np.testing.assert_allclose(table[:, 4:], np.cos(np.arange(5)[:, None] * rates), atol=1e-6)


def test_impossible_rope_is_refused():
    with pytest.raises(ConfigError, match="dims must be even"):
        RopeConfig(dims=7)
    with pytest.raises(ConfigError, match="short_factors has 2 entries for 4"):
        scaling = RopeScaling(kind="longrope", short_factors=(1.0, 1.0), long_factors=(1.0,) * 4)
        RopeConfig(dims=8, scaling=scaling)
