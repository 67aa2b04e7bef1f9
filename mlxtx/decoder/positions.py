"""Rotary position embedding with every scaling, ALiBi slopes and sinusoidal tables."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Any

import mlx.core as mx

from mlxtx.cache.numerics import on_gpu
from mlxtx.cache.step import Step
from mlxtx.decoder.config import RopeConfig, RopeScaling, TemperatureConfig


class Rotary:
    """RoPE of queries and keys at a step's positions (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

    def __init__(self, config: RopeConfig):
        self.config = config

    def __call__(self, x: mx.array, step: Step) -> mx.array:  # [B, H, T, D] -> the same
        dims, tail = self.config.dims, self.config.tail
        amplitude = self._amplitude(step)
        if tail or (amplitude is not None and dims < x.shape[-1]):
            # Only the rotated channels are scaled, so they are taken out and put back.
            cut = x.shape[-1] - dims if tail else dims
            first, last = x[..., :cut], x[..., cut:]
            if tail:
                return mx.concatenate([first, self._rotate(amplitude, last, step)], axis=-1)
            return mx.concatenate([self._rotate(amplitude, first, step), last], axis=-1)
        return self._rotate(amplitude, x, step)

    def _amplitude(self, step: Step) -> float | mx.array | None:
        """What rotated channels are multiplied by; None: nothing, [B, 1, 1, 1]: rows differ."""
        scaling = self.config.scaling
        if scaling is None or scaling.long_attention_factor is None:
            return scaling.attention_factor if scaling and scaling.attention_factor != 1.0 else None
        both = scaling.attention_factor, scaling.long_attention_factor
        rows = [both[length > scaling.original_context] for length in step.row_lengths]
        return rows[0] if len(set(rows)) == 1 else mx.array(rows)[:, None, None, None]

    def _rotate(self, amplitude: float | mx.array | None, x: mx.array, step: Step) -> mx.array:
        if amplitude is not None:
            x = (x * amplitude).astype(x.dtype)
        wavelengths = self._wavelengths(step)
        # MLX has no kernel for this on a CPU, and would make the same cosines for every layer:
        # half the work where tokens are few.
        few = step.count <= 8 and not on_gpu()
        if few or step.positions is not None or wavelengths.ndim > 1:
            turn = step.memo(("turn", self.config), lambda: turns(wavelengths, step))
            return rotate(x, turn, self.config)
        return mx.fast.rope(
            x,
            self.config.dims,
            traditional=self.config.interleaved,
            base=None,
            scale=1.0,
            offset=step.first_position,
            freqs=wavelengths,
        )

    def kernel_arguments(self, step: Step, batch: int) -> dict[str, Any] | None:
        """This rotation for the kernel ``mlxtx.metal_kernels.rope``; None if it cannot do it."""
        wavelengths = self._wavelengths(step)
        amplitude = self._amplitude(step)
        rows_differ = wavelengths.ndim > 1 or isinstance(amplitude, mx.array)
        if self.config.tail or step.positions is not None or rows_differ:
            return None
        return {
            "inverse_frequencies": step.memo(("1/rope", self.config), lambda: 1 / wavelengths),
            "offsets": step.memo(
                ("offsets", batch),
                lambda: mx.broadcast_to(mx.array(step.first_position, mx.int32), (batch,)),
            ),
            "interleaved": self.config.interleaved,
            "rotated_dims": self.config.dims,
            "amplitude": 1.0 if amplitude is None else amplitude,
        }

    def _wavelengths(self, step: Step) -> mx.array:
        """Positions are divided by these, [dims/2]; [B, dims/2] when rows of other lengths differ."""
        scaling = self.config.scaling
        if scaling is None or not scaling.depends_on_length:
            return self._fixed

        def of_rows() -> mx.array:
            tables = [wavelengths(self.config, length) for length in step.row_lengths]
            return tables[0] if all(table is tables[0] for table in tables) else mx.stack(tables)

        return step.memo(("rope", self.config), of_rows)

    @cached_property
    def _fixed(self) -> mx.array:
        return wavelengths(self.config)


def turns(wavelengths: mx.array, step: Step) -> tuple[mx.array, mx.array]:
    """Cosine and sine [1|B, 1, T, dims/2] of wavelengths [dims/2] or [B, dims/2] at a step."""
    table = wavelengths if wavelengths.ndim > 1 else wavelengths[None]
    angles = step.query_positions[:, None, :, None].astype(mx.float32) / table[:, None, None, :]
    return mx.cos(angles), mx.sin(angles)


def rotate(x: mx.array, turn: tuple[mx.array, mx.array], config: RopeConfig) -> mx.array:
    """RoPE of x [B, H, T, D] in plain operations, ``turn`` as from ``turns``."""
    cos, sin = turn
    half = config.dims // 2
    rotated = x[..., : config.dims].astype(mx.float32)
    if config.interleaved:
        pairs = rotated.reshape(*rotated.shape[:-1], half, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        turned = mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(rotated.shape)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        turned = mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    turned = turned.astype(x.dtype)
    if config.dims == x.shape[-1]:
        return turned
    return mx.concatenate([turned, x[..., config.dims :]], axis=-1)


def wavelengths(config: RopeConfig, length: int = 0) -> mx.array:
    """What each position is divided by, float32 [dims/2] (2 pi times it is the wavelength).

    ``length`` is the number of tokens in the row, for scalings that follow it.
    """
    scaling = config.scaling
    if scaling is not None and scaling.kind == "dynamic":
        length = max(length, scaling.original_context)
    elif scaling is not None and scaling.kind == "longrope":
        length = int(length > scaling.original_context)
    else:
        length = 0
    return _table(config, length)


@lru_cache(maxsize=256)
def _table(config: RopeConfig, length: int) -> mx.array:
    scaling, dims, base = config.scaling, config.dims, config.base
    if scaling is not None and scaling.kind == "dynamic":
        # NTK-aware: the base grows with the length beyond the trained context.
        stretch = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
        base *= stretch ** (dims / (dims - 2))
    table = [base ** (channel / dims) for channel in range(0, dims, 2)]
    if scaling is None or scaling.kind == "dynamic":
        pass
    elif scaling.kind == "linear":
        table = [wave * scaling.factor for wave in table]
    elif scaling.kind == "longrope":
        factors = scaling.long_factors if length else scaling.short_factors
        table = [wave * factor for wave, factor in zip(table, factors, strict=True)]
    elif scaling.kind == "llama3":
        table = [_llama3(wave, scaling) for wave in table]
    elif scaling.kind == "yarn":
        table = _yarn(table, base, scaling)
    else:  # proportional: the frequencies of the whole head, of which only the first turn
        turning = int(scaling.turning * dims // 2)
        table = [wave * scaling.factor if i < turning else math.inf for i, wave in enumerate(table)]
    return mx.array([-wave for wave in table] if config.backwards else table)


def _llama3(wave: float, scaling: RopeScaling) -> float:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    cycles = scaling.original_context / (2 * math.pi * wave)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    blend = 0.0 if cycles < low else 1.0 if cycles > high else (cycles - low) / (high - low)
    return 1 / ((1 - blend) / (wave * scaling.factor) + blend / wave)


def _yarn(table: list[float], base: float, scaling: RopeScaling) -> list[float]:
    """YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071), section 3.2."""
    dims = 2 * len(table)

    def channel(rotations: float) -> float:
        turns = scaling.original_context / (rotations * 2 * math.pi)
        return dims * math.log(turns) / (2 * math.log(base))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    high = high + 0.001 if high == low else high
    ramps = [min(max((i - low) / (high - low), 0), 1) for i in range(len(table))]
    return [
        1 / (ramp / (scaling.factor * wave) + (1 - ramp) / wave)
        for ramp, wave in zip(ramps, table, strict=True)
    ]


def yarn_amplitude(factor: float, multiplier: float = 1.0) -> float:
    """How much YaRN scales queries and keys: 0.1 multiplier ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def longrope_amplitude(factor: float, original_context: int) -> float:
    """How much LongRoPE scales queries and keys (Ding et al. 2024)."""
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_context))


def alibi_slopes(heads: int, max_bias: float = 8.0) -> tuple[float, ...]:
    """ALiBi's slopes (Press et al. 2022); head counts between powers of two take every other
    slope of the next power, as the authors do."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-max_bias * (i + 1) / power) for i in range(power)]
    extra = [2 ** (-max_bias * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return tuple(slopes + extra[: heads - power])


def query_temperature(config: TemperatureConfig, step: Step, dtype: mx.Dtype) -> mx.array:
    """The factor of each query by its position, [1|B, 1, T, 1]."""

    def make() -> mx.array:
        positions = mx.maximum(step.query_positions, 0).astype(mx.float32)
        grown = mx.floor((positions + config.shift) / config.floor)
        return (1 + config.beta * mx.log1p(grown))[:, None, :, None]

    return step.memo(("temperature", config), make).astype(dtype)


@lru_cache(maxsize=4)
def sinusoidal_table(rows: int, width: int) -> mx.array:
    """Sines in the first half of the channels, cosines in the second, [rows, width]
    (Vaswani et al. 2017, in the layout of tensor2tensor)."""
    import numpy as np  # float64, for few families

    half = width // 2
    rates = np.exp(-math.log(10000.0) / (half - 1) * np.arange(half))
    angles = np.arange(rows)[:, None] * rates[None]
    return mx.array(np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32))
