"""Which cache each layer of a decoder gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxtx.cache.attention import AttentionSpec
from mlxtx.cache.layer import DEFAULT_REWIND, LayerLayout, RowsCache, layer_layout
from mlxtx.cache.model_cache import ModelCache
from mlxtx.cache.settings import KVSettings, parse_kv


def make_cache(
    blocks: Sequence[Any],
    kv: str | KVSettings | None = None,
    *,
    left_padding: Sequence[int] | None = None,
    rewind: int = DEFAULT_REWIND,
) -> ModelCache:
    """A cache for every one of ``blocks`` (``BlockConfig``), kept as ``kv`` says: see
    ``mlxtx.cache.settings``. ``rewind``: how many tokens a layer with a window can take back."""
    settings = parse_kv(kv)
    layouts = layer_layouts(blocks, settings, left_padding=left_padding, rewind=rewind)
    sources = [getattr(block.attention, "shares_cache_of", None) for block in blocks]
    layers: list[RowsCache] = []
    for layout, source in zip(layouts, sources, strict=True):
        if source is None:
            layers.append(RowsCache(layout, settings, shared=len(layers) in sources))
        else:
            layers.append(layers[source])
    return ModelCache(layers, settings=settings, left_padding=left_padding)


def layer_layouts(
    blocks: Sequence[Any],
    settings: KVSettings,
    *,
    left_padding: Sequence[int] | None = None,
    rewind: int = DEFAULT_REWIND,
) -> list[LayerLayout]:
    """The layout of each block's cache; a layer that shares another's has the other's."""
    padding = max(left_padding or (0,))
    layouts: list[LayerLayout] = []
    for block in blocks:
        source = getattr(block.attention, "shares_cache_of", None)
        if source is not None:
            layouts.append(layouts[source])
            continue
        spec = spec_of(block.attention)
        layouts.append(layer_layout(spec, settings, padding=padding, rewind=rewind))
    return layouts


def spec_of(attention: Any) -> AttentionSpec:
    """What decides how long rows are needed, from an attention config."""
    return AttentionSpec(
        scale=1.0,
        window=attention.window,
        chunk=getattr(attention, "chunk", None),
        stride=getattr(attention, "stride", None),
        global_tokens=getattr(attention, "global_tokens", 0),
    )
