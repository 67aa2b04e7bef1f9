"""Which cache each layer of a decoder gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlxtx.cache.attention import AttentionSpec
from mlxtx.cache.layer import DEFAULT_REWIND, LayerLayout, RowsCache, layer_layout, narrowed
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
    if rewind < 0:
        raise ValueError(f"a cache can't take back {rewind} tokens: rewind is 0 or more")
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


def warm_up_kernels(blocks: Sequence[Any], kv: str | KVSettings | None, dtype: mx.Dtype) -> int:
    """Compiles the Metal kernels that caches of ``blocks`` will use, each shape once, so that the
    first reply does not wait for it. Off Metal it does nothing; returns how many ran."""
    from mlxtx.metal_kernels.warm_up import warm_up

    settings = parse_kv(kv)
    shapes = {tuple(sorted(_kernel_shape(block.attention, settings).items())) for block in blocks}
    return sum(warm_up(dtype=dtype, **dict(shape)) for shape in shapes)


def _kernel_shape(attention: Any, settings: KVSettings) -> dict[str, Any]:
    shape = {"key_bits": settings.key_bits, "value_bits": settings.value_bits}
    shape |= {"group_size": settings.group_size, "rotate": settings.rotate}
    shape["heads"] = attention.heads
    spec = narrowed(spec_of(attention), settings)
    shape |= {"window": spec.window if spec.only_near else None, "masked": not spec.only_near}
    shape |= {"softcap": attention.softcap, "sinks": attention.sinks}
    if hasattr(attention, "kv_rank"):
        dim = attention.kv_rank + attention.rope_dim
        latent = {"kv_heads": 1, "head_dim": dim, "value_dim": attention.kv_rank, "latent": True}
        return shape | latent
    rope = attention.rope
    shape |= {"kv_heads": attention.kv_heads, "head_dim": attention.head_dim}
    shape |= {"value_dim": attention.value_dim, "slopes": bool(attention.alibi)}
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name)
        shape[name] = norm is not None and norm.norm.weight
    if rope is not None:
        shape |= {"rotated_dims": rope.dims, "interleaved": rope.interleaved}
    return shape


def spec_of(attention: Any) -> AttentionSpec:
    """What decides how long rows are needed, from an attention config."""
    return AttentionSpec(
        scale=1.0,
        window=attention.window,
        chunk=getattr(attention, "chunk", None),
        stride=getattr(attention, "stride", None),
        global_tokens=getattr(attention, "global_tokens", 0),
    )
