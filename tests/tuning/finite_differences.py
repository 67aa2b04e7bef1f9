"""Directional derivatives by central differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest


def check_directions(
    weights: Mapping[str, np.ndarray],
    gradients: Mapping,
    loss: Callable[[dict[str, np.ndarray]], float],
    step: float = 1e-5,
) -> None:
    """Each gradient along a random direction against float64 differences of ``loss``."""
    rng = np.random.default_rng(3)
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        up, down = (loss({name: weights[name] + sign * step * direction}) for sign in (1, -1))
        exact = float((np.array(gradient, np.float64) * direction).sum())
        size = float(np.linalg.norm(np.array(gradient, np.float64)))
        assert exact == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-5 * size), name
