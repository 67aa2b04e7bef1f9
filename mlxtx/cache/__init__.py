"""The cache owns attention: the block hands it projections and never asks what kind it is."""

from mlxtx.cache.attention import AttentionSpec, attention
from mlxtx.cache.base import LayerCache, ModelCache, PlainCache, Uncached
from mlxtx.cache.make import make_cache
from mlxtx.cache.step import Step

__all__ = [
    "AttentionSpec",
    "LayerCache",
    "ModelCache",
    "PlainCache",
    "Step",
    "Uncached",
    "attention",
    "make_cache",
]
