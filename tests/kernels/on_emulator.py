"""The kernels' own host code, launching on the emulator; and the measure of their error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from mlxtx.metal_kernels import dispatch

from tests.metal_emulator import Emulator, missing

needs_emulator = pytest.mark.skipif(bool(missing("plain")), reason=missing("plain") or "")
needs_counters = pytest.mark.skipif(bool(missing()), reason=missing() or "")

TYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Binary digits of the significand; a unit in the last place of a row is 2^(exponent - digits).
DIGITS = {mx.float32: 23, mx.float16: 10, mx.bfloat16: 7}


@contextmanager
def emulated(
    mode: str = "checked", seed: int = 0, tuning: dict | None = None
) -> Iterator[Emulator]:
    """Inside, Metal counts as present and its kernels run on the emulator; without clang 19, which
    checks need, in the plain mode."""
    mode = "plain" if missing(mode) else mode
    numbers = {"default": dispatch.Tuning(**(vars(dispatch.TUNING["default"]) | (tuning or {})))}
    with (
        Emulator(mode, seed) as emulator,  # type: ignore[arg-type]
        mock.patch.object(dispatch, "on_metal", lambda: True),
        mock.patch.object(dispatch, "TUNING", numbers),
        mock.patch.object(dispatch, "remembered", dict),
    ):
        yield emulator


def draw(draws: np.random.Generator, dtype: mx.Dtype, *shape: int) -> mx.array:
    """Normal numbers, already rounded to the dtype."""
    return mx.array(draws.normal(size=shape).astype(np.float32)).astype(dtype)


def to_float64(array: mx.array) -> np.ndarray:
    """The numbers an array holds."""
    return np.array(array.astype(mx.float32)).astype(np.float64)


def units_in_the_last_place(found: mx.array, expected: np.ndarray) -> float:
    """The largest error, in units in the last place of the largest value of its row."""
    scale = np.abs(expected).max(axis=-1, keepdims=True)
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    unit = 2.0 ** (np.floor(np.log2(scale)) - DIGITS[found.dtype])
    return float((np.abs(to_float64(found) - expected) / unit).max())
