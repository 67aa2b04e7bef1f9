"""Whole decoders with every kind of cache: chunks, single tokens, batches, going back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxtx.cache import kernels
from mlxtx.cache.make import warm_up_kernels
from mlxtx.errors import MlxtxError
from tests.cache.tiny_models import KINDS, SLOPES, tiny_model

TOKENS = np.random.default_rng(3).integers(0, 50, 60).tolist()
# Fractions of channels are the same whichever way a prompt is cut, so only rounding may differ.
CLOSE = {"atol": 3e-4, "rtol": 1e-3}


def logits(model, tokens, cache, sizes) -> np.ndarray:
    out, start = [], 0
    for size in sizes:
        out.append(model(mx.array([tokens[start : start + size]]), cache))
        start += size
    assert start == len(tokens)
    return np.array(mx.concatenate(out, axis=1))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", ["plain", "k8v4g32", "k6v5g64r", "k3v2g32r"])
def test_chunks_and_single_tokens_equal_the_whole(kind, kv):
    model = tiny_model(*KINDS[kind])
    whole = logits(model, TOKENS, model.make_cache(kv), [60])
    for sizes in ([17, 1, 30, 12], [5, *[1] * 55]):
        cut = logits(model, TOKENS, model.make_cache(kv), sizes)
        np.testing.assert_allclose(cut, whole, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metal", [False, True])
def test_a_plain_cache_equals_none(kind, metal, monkeypatch):
    monkeypatch.setattr(kernels, "on_metal", lambda: metal)  # the kernels' references here
    model = tiny_model(*KINDS[kind])
    without = np.array(model(mx.array([TOKENS])))[0]
    np.testing.assert_allclose(
        logits(model, TOKENS, model.make_cache(), [40, 20]), without, **CLOSE
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("kind", [*KINDS, "slopes"])
def test_padding_without_a_cache_leaves_rows_alone(kind, dtype):
    model = tiny_model(*KINDS.get(kind, (SLOPES, SLOPES)))
    model.set_dtype(dtype)
    both = mx.array([[0] * 25 + TOKENS[:20], TOKENS[:45]])
    padded = model(both, left_padding=[25, 0])[0, 25:].astype(mx.float32)
    alone = model(mx.array([TOKENS[:20]]))[0].astype(mx.float32)
    np.testing.assert_allclose(padded, alone, atol=3e-4 if dtype == mx.float32 else 0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", ["plain", "k8v6g32r", "k4v4g32f3n8"])
def test_rows_of_a_ragged_batch_equal_themselves_alone(kind, kv):
    model = tiny_model(*KINDS[kind])
    lengths = [43, 20, 31]
    padding = [max(lengths) - n for n in lengths]
    rows = [[0] * p + TOKENS[:n] for n, p in zip(lengths, padding, strict=True)]
    cache = model.make_cache(kv, left_padding=padding)
    first = np.array(model(mx.array(rows), cache, last=1))
    then = np.array(model(mx.array([[7], [8], [9]]), cache))
    for number, length in enumerate(lengths):
        alone = model.make_cache(kv)
        wanted = np.array(model(mx.array([TOKENS[:length]]), alone, last=1))
        if "n" not in kv:  # which rows are the newest depends on how a prompt is cut
            np.testing.assert_allclose(first[number], wanted[0], **CLOSE)
            wanted = np.array(model(mx.array([[7 + number]]), alone))
            np.testing.assert_allclose(then[number], wanted[0], **CLOSE)
        assert np.isfinite(then).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", ["plain", "k8v4g32", "k4v4g32rf2"])
def test_rolling_back_leaves_no_trace(kind, kv):
    model = tiny_model(*KINDS[kind])
    cache = model.make_cache(kv, rewind=9)
    logits(model, TOKENS[:40], cache, [30, *[1] * 10])
    branch = cache.copy()
    logits(model, [1, 2, 3, 4, 5, 6, 7, 8, 9], cache, [4, 5])
    cache.rollback(9)
    assert cache.offset == 40
    again = logits(model, TOKENS[40:50], cache, [10])
    np.testing.assert_allclose(again, logits(model, TOKENS[40:50], branch, [10]), **CLOSE)


def test_going_back_too_far_changes_nothing():
    model = tiny_model(*KINDS["windows"])
    cache = model.make_cache(rewind=4)
    logits(model, TOKENS, cache, [60])
    assert cache.can_rollback(4) and not cache.can_rollback(30)
    with pytest.raises(MlxtxError, match="can take back 4 tokens, not 30"):
        cache.rollback(30)
    assert cache.offset == 60
    assert {layer.rows for layer in cache} == {60}
    cache.rollback(60)  # all of it is always possible
    assert cache.offset == 0
    fresh = logits(model, TOKENS, model.make_cache(), [60])
    np.testing.assert_allclose(logits(model, TOKENS, cache, [60]), fresh, **CLOSE)


@pytest.mark.parametrize("kv", ["w9", "w9s2", "k8v4g32w9"])
def test_a_window_that_keeps_nothing_to_go_back_shows_what_one_that_does_shows(kv):
    model = tiny_model(*KINDS["windows"])
    sizes = [9, 11, *[1] * 20, 8, 12]  # after 20 rows a ring of 8 begins in the middle, later not
    kept = logits(model, TOKENS, model.make_cache(kv), sizes)
    bare = logits(model, TOKENS, model.make_cache(kv, rewind=0), sizes)
    np.testing.assert_allclose(bare, kept, **CLOSE)
    with pytest.raises(ValueError, match="rewind is 0 or more"):
        model.make_cache(kv, rewind=-1)


def test_packed_rows_are_refused():
    model = tiny_model()
    with pytest.raises(MlxtxError, match="without a cache"):
        model(mx.array([TOKENS]), model.make_cache(), segments=mx.zeros((1, 60), mx.int32))


def test_bytes_are_those_of_the_buffers():
    model = tiny_model(*KINDS["windows"])  # full: 2 heads of 16; window: 1 head, shared
    cache = model.make_cache("k8v4g32", rewind=4)
    logits(model, TOKENS, cache, [60])
    scales = 2 * 4  # float32 scale and bias of one group of 32
    full = 256 * 2 * ((32 + scales) + (16 + scales))
    window = (12 - 1 + 4) * 1 * ((32 + scales) + (16 + scales))
    assert cache.nbytes == full + window
    assert cache.nbytes == sum(array.nbytes for array in cache.state())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", ["plain", "k8v4g32", "k8v4g32r"])
def test_kernels_are_warmed_with_the_shapes_of_the_layers(kind, kv, monkeypatch):
    """Off Metal the wrappers run their references, so the shapes have to fit together."""
    from mlxtx.metal_kernels import dispatch

    blocks = tiny_model(*KINDS[kind]).config.blocks
    assert warm_up_kernels(blocks, kv, mx.float32) == 0
    monkeypatch.setattr(dispatch, "on_metal", lambda: True)
    monkeypatch.setattr(dispatch, "choose", lambda *a, **k: "reference")
    assert warm_up_kernels(blocks, kv, mx.float32) >= 4 * len({b.attention for b in blocks}) - 4
