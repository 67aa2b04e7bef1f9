"""Where attention over a cache leaves plain ``mx`` operations: MLX's fused kernel and our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlxtx.cache.attention import AttentionSpec
from mlxtx.cache.numerics import on_gpu
from mlxtx.cache.segment import Part
from mlxtx.cache.step import Step


def fused_attention_available(q: mx.array, spec: AttentionSpec) -> bool:
    """MLX attends over plain rows in one kernel that makes no score matrix: on a GPU."""
    return on_gpu() and spec.softcap is None and not spec.slopes


def attend_with_kernels(
    q: mx.array,
    parts: Sequence[Part],
    *,
    spec: AttentionSpec,
    step: Step,
    sinks: mx.array | None,
    expand: Callable[[mx.array], tuple[mx.array, mx.array]] | None,
) -> mx.array | None:
    """The project's Metal kernels, or None where they don't apply."""
    return None
