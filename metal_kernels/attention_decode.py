"""Attention of one to eight query rows over a whole cache buffer, plain or quantized."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .attention_reference import Rows, attention_reference


def attention_decode(
    q: mx.array,
    keys: Rows,
    values: Rows | None,
    *,
    lengths: mx.array | Sequence[int],
    scale: float,
    window: int | None = None,
    sinks: mx.array | None = None,
    softcap: float | None = None,
    slopes: mx.array | None = None,
    mask: mx.array | None = None,
    starts: mx.array | Sequence[int] | None = None,
    value_dim: int | None = None,
    longest: int | None = None,
) -> mx.array:
    """[B, H, T, Dv] for one to eight query rows; arguments as in ``attention_reference``."""
    return attention_reference(
        q,
        keys,
        values,
        lengths=lengths,
        scale=scale,
        window=window,
        sinks=sinks,
        softcap=softcap,
        slopes=slopes,
        mask=mask,
        starts=starts,
        value_dim=value_dim,
        longest=longest,
    )


attention_decode_reference = attention_reference
