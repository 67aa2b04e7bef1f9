"""A learned bias for each head and distance (T5, Raffel et al. 2020, https://arxiv.org/abs/1910.10683,
section 2.1): distances fall into buckets, exact when near and logarithmic when far."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn


def relative_bucket(distance: mx.array, buckets: int, farthest: int) -> mx.array:
    """The bucket of each distance (key's position minus the query's), as T5's decoder has them:
    keys ahead share the bucket of distance 0, and beyond ``farthest`` all are in the last one."""
    distance = -mx.minimum(distance, 0)
    exact = buckets // 2
    growth = mx.log(mx.maximum(distance, 1) / exact) / math.log(farthest / exact)
    far = mx.minimum(exact + (growth * (buckets - exact)).astype(mx.int32), buckets - 1)
    return mx.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """What is added to the scores of queries and keys at given positions."""

    def __init__(self, heads: int, buckets: int = 32, farthest: int = 128):
        super().__init__()
        self.weight = mx.zeros((buckets, heads))
        self._farthest = farthest

    def __call__(self, queries: mx.array, keys: mx.array) -> mx.array:
        """Positions [T] and [S] -> [1, H, T, S], the ``bias`` of ``mlxtx.cache.attention``."""
        distance = keys[None, :] - queries[:, None]
        bucket = relative_bucket(distance, self.weight.shape[0], self._farthest)
        return self.weight[bucket].transpose(2, 0, 1)[None]
