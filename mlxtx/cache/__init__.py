"""The cache owns attention: the block hands it projections and never asks what kind it is."""

from mlxtx.cache.attention import AttentionSpec, attention
from mlxtx.cache.base import LayerCache, Uncached
from mlxtx.cache.layer import DEFAULT_REWIND, RowsCache
from mlxtx.cache.make import make_cache
from mlxtx.cache.model_cache import ModelCache
from mlxtx.cache.settings import KVSettings, parse_kv
from mlxtx.cache.step import Step

__all__ = [
    "DEFAULT_REWIND",
    "AttentionSpec",
    "KVSettings",
    "LayerCache",
    "ModelCache",
    "RowsCache",
    "Step",
    "Uncached",
    "attention",
    "make_cache",
    "parse_kv",
]
