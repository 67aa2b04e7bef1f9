"""Weights by name and as the nested tree that modules take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


def named(tree: Any, prefix: str = "") -> dict[str, mx.array]:
    """``{"layers": [{"weight": w}]}`` -> ``{"layers.0.weight": w}``."""
    flat = cast("list[tuple[str, mx.array]]", tree_flatten(tree))
    return {f"{prefix}.{name}" if prefix else name: array for name, array in flat}


def nested(arrays: Mapping[str, mx.array]) -> Any:
    return tree_unflatten(list(arrays.items()))


def frozen(model: Any) -> dict[str, mx.array]:
    """The weights of ``model`` that training leaves as they are."""
    trained = named(model.trainable_parameters())
    return {name: array for name, array in named(model.parameters()).items() if name not in trained}
