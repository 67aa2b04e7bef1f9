"""Attention over a cache stays within a bound of memory, whatever the length."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxtx.cache import AttentionSpec, Step
from mlxtx.cache.layer import RowsCache, layer_layout
from mlxtx.cache.numerics import exp
from mlxtx.cache.settings import parse_kv

HEADS, KV_HEADS, DIM, ROWS, NEW = 4, 2, 64, 6144, 1024
SPEC = AttentionSpec(scale=0.125)
SCORES = HEADS * NEW * ROWS * 4  # bytes of the whole score matrix


def same(q, k, step):
    return q, k


def fed(kv: str) -> RowsCache:
    settings = parse_kv(kv)
    cache = RowsCache(layer_layout(SPEC, settings), settings)
    mx.random.seed(0)
    k = mx.random.normal((1, KV_HEADS, ROWS - NEW, DIM))
    cache._append(k, k, ROWS)
    cache.rows = ROWS - NEW
    mx.eval(cache.state())
    return cache


def transient(kv: str) -> float:
    """Bytes above what was held before a chunk of a prompt, at the peak."""
    cache = fed(kv)
    q = mx.random.normal((1, HEADS, NEW, DIM))
    k = mx.random.normal((1, KV_HEADS, NEW, DIM))
    mx.eval(q, k)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(cache.attend(q, k, k, prepare=same, spec=SPEC, step=Step(NEW, ROWS - NEW)))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("kv", ["plain", "k4v4g64", "k3v5g32r"])
def test_a_prompt_never_holds_the_score_matrix(kv):
    bound = 16e6  # a few slices of scores, the decoded rows and the result; measured 9 to 12 MB
    assert 6 * bound < SCORES
    assert transient(kv) < bound


def test_a_quantized_cache_takes_less_than_a_plain_one():
    peaks = {}
    for kv in ("plain", "k4v4g64"):
        held = sum(array.nbytes for array in fed(kv).state())
        peaks[kv] = held + transient(kv)
    assert peaks["k4v4g64"] < peaks["plain"]


def test_appending_writes_in_place():
    """A buffer that no copy shares is never copied to take one more row."""
    cache = fed("plain")
    row = mx.random.normal((1, KV_HEADS, 1, DIM))
    q = mx.random.normal((1, HEADS, 1, DIM))
    held = cache.nbytes
    for offset in range(ROWS - NEW, ROWS - NEW + 3):
        mx.eval(row, q)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(cache.attend(q, row, row, prepare=same, spec=SPEC, step=Step(1, offset)))
        assert mx.get_peak_memory() - before < held / 4
    assert cache.nbytes == held


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kv", ["plain", "k8v4g64", "k4v4g64f4n128", "w200s4", "k4v4g64f4w200"])
def test_nothing_is_held_but_the_buffers(kv, window):
    """Neither the prompt's keys, of which few rows are kept, nor what rows that nobody sees any
    more are made of: a tail that is wider than the window leaves such behind all the time."""
    spec, settings = AttentionSpec(scale=0.125, window=window), parse_kv(kv)
    cache = RowsCache(layer_layout(spec, settings), settings)
    mx.synchronize()  # a device may give memory back a little later
    before = mx.get_active_memory()
    for offset, count in [(0, 900), *((rows, 1) for rows in range(900, 1000))]:
        q, k, v = (mx.random.normal((1, heads, count, DIM)) for heads in (HEADS, 2, 2))
        out = cache.attend(q, k, v, prepare=same, spec=spec, step=Step(count, offset))
        mx.eval(out)
        if count > 1 or offset == 999:
            del q, k, v, out
            mx.synchronize()
            pages = 16384 * len(cache.state())  # buffers are whole pages on some systems
            assert mx.get_active_memory() - before <= cache.nbytes + pages


def test_exp_is_accurate():
    x = np.concatenate([-np.logspace(-8, 1.94, 50_000), [0.0, -86.9, -200.0, -np.inf]])
    x = x.astype(np.float32)
    got = np.array(exp(mx.array(x)), np.float64)
    wanted = np.exp(x.astype(np.float64))
    normal = wanted > 1e-37
    # x * log2(e) and log2(e) itself are rounded to 24 bits, which weighs with x.
    error = np.abs(got[normal] / wanted[normal] - 1)
    assert (error < 3e-7 + 1e-7 * np.abs(x[normal])).all()
    assert got[-2:].tolist() == [0.0, 0.0]
    assert (got[~normal] < 2e-37).all()


def test_gradients_pass_through():
    """Nothing can be evaluated under a gradient; it is the one of the whole score matrix."""
    cache = fed("plain")
    q = mx.random.normal((1, HEADS, 32, DIM))
    k = mx.random.normal((1, KV_HEADS, 32, DIM))
    rows = ROWS - NEW

    def sliced(q, k):
        step = Step(32, rows)
        return (cache.copy().attend(q, k, k, prepare=same, spec=SPEC, step=step) ** 2).sum()

    def whole(q, k):
        every = mx.concatenate([cache.body.parts()[0].keys, k], axis=2)
        out = mx.fast.scaled_dot_product_attention(q, every, every, scale=0.125, mask="causal")
        return (out**2).sum()

    got, wanted = (mx.grad(f, argnums=(0, 1))(q, k) for f in (sliced, whole))
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-5, rtol=1e-3)
