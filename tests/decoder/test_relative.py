"""T5's relative bias against the paper's buckets, written out one distance at a time."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlxtx.cache.attention import AttentionSpec, attention
from mlxtx.decoder.relative import RelativeBias, relative_bucket


def bucket(distance: int, buckets: int, farthest: int) -> int:
    distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(farthest / exact)
    return min(exact + int(share * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (6, 9)])
def test_buckets_are_those_of_the_paper(buckets: int, farthest: int) -> None:
    distances = list(range(-200, 60))
    got = relative_bucket(mx.array(distances), buckets, farthest).tolist()
    expected = [bucket(distance, buckets, farthest) for distance in distances]
    off = [d for d, a, b in zip(distances, got, expected, strict=True) if a != b]
    # Where the logarithm is a whole number, float32 and float64 may fall on different sides.
    assert len(off) <= 3
    assert all(abs(a - b) <= 1 for a, b in zip(got, expected, strict=True))


def test_bias_is_added_to_the_scores_of_each_head() -> None:
    mx.random.seed(0)
    bias = RelativeBias(heads=3, buckets=8, farthest=20)
    bias.weight = mx.random.normal((8, 3))
    q, k, v = (mx.random.normal((1, 3, n, 4)) for n in (2, 5, 5))
    queries, keys = mx.array([3, 4]), mx.arange(5)
    out = attention(q, k, v, spec=AttentionSpec(scale=0.5), mask="causal", bias=bias(queries, keys))
    weight = np.array(bias.weight, dtype=np.float64)
    expected = np.zeros(out.shape)
    for head in range(3):
        for row, query in enumerate((3, 4)):
            scores = [
                0.5 * float(np.dot(np.array(q[0, head, row]), np.array(k[0, head, key])))
                + weight[bucket(key - query, 8, 20), head]
                for key in range(query + 1)
            ]
            shares = np.exp(scores) / np.exp(scores).sum()
            expected[0, head, row] = shares @ np.array(v[0, head, : query + 1])
    np.testing.assert_allclose(np.array(out), expected, atol=1e-5)
