"""Bytes of a cache that is not there yet: what ``ModelCache.nbytes`` will be, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxtx.cache.layer import DEFAULT_REWIND, TAIL_SLACK, LayerLayout
from mlxtx.cache.make import layer_layouts
from mlxtx.cache.rows import PLAIN_FORMAT, RowFormat, capacity_for
from mlxtx.cache.settings import KVSettings
from mlxtx.decoder.config import DecoderConfig, LatentAttentionConfig


def cache_bytes(
    config: DecoderConfig,
    settings: KVSettings,
    tokens: int,
    *,
    batch: int = 1,
    itemsize: int = 2,
    rewind: int = DEFAULT_REWIND,
) -> int:
    """Bytes of all buffers once a prompt of ``tokens`` is in, for rows of ``itemsize`` bytes a
    number. Buffers hold whole blocks of rows; what is generated lets them grow by an eighth."""
    layouts = layer_layouts(config.blocks, settings, rewind=rewind)
    return batch * sum(
        _layer_bytes(block.attention, layout, tokens, itemsize)
        for block, layout in zip(config.blocks, layouts, strict=True)
        if getattr(block.attention, "shares_cache_of", None) is None
    )


def row_bytes(attention: Any, formats: Sequence[RowFormat], itemsize: int) -> int:
    """Bytes of one token's rows in one layer, keys and values in their formats."""
    keys, values = formats
    if isinstance(attention, LatentAttentionConfig):
        return keys.nbytes(attention.kv_rank + attention.rope_dim, itemsize)
    dims = attention.head_dim, attention.value_dim
    both = keys.nbytes(dims[0], itemsize) + values.nbytes(dims[1], itemsize)
    return attention.kv_heads * both


def _layer_bytes(attention: Any, layout: LayerLayout, tokens: int, itemsize: int) -> int:
    formats = (layout.key_format, layout.value_format)
    plain = (PLAIN_FORMAT, PLAIN_FORMAT)
    total = 0
    if layout.head:
        slots = capacity_for(min(tokens, layout.head), layout.head)
        total += slots * row_bytes(attention, layout.head_formats, itemsize)
    body = max(0, tokens - layout.head)
    if layout.newest:
        tail = body if body <= layout.newest + TAIL_SLACK else layout.newest
        total += capacity_for(tail, None) * row_bytes(attention, plain, itemsize)
        body -= tail
    if body:
        ring = None if layout.reach is None else max(1, layout.reach - 1 + layout.rewind)
        reserved = max(body, tokens - layout.head)
        slots = capacity_for(reserved if ring is None else min(reserved, ring), ring)
        total += slots * row_bytes(attention, formats, itemsize)
    return total
