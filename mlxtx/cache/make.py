"""Which cache each layer of a decoder gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxtx.cache.base import ModelCache, PlainCache


def make_cache(
    blocks: Sequence[Any], kv: str | None = None, *, left_padding: Sequence[int] | None = None
) -> ModelCache:
    """A cache for every one of ``blocks`` (``BlockConfig``), kept as ``kv`` says."""
    layers: list = []
    for block in blocks:
        source = getattr(block.attention, "shares_cache_of", None)
        layers.append(PlainCache() if source is None else layers[source])
    return ModelCache(layers, left_padding=left_padding)
