"""Which saved prefix a prompt goes on from."""

from __future__ import annotations

import errno
import os

import mlx.core as mx
import numpy as np

from mlxtx.cache.fingerprint import fingerprint
from mlxtx.cache.prefix_store import PrefixStore
from mlxtx.cache.reuse import ReusedCache
from tests.cache.test_saved import TOKENS, filled
from tests.cache.tiny_models import KINDS, tiny_model


def test_a_window_takes_the_prefix_that_needs_no_cutting(tmp_path):
    model = tiny_model(*KINDS["windows"])
    store, mark = PrefixStore(tmp_path), fingerprint(model)
    for age, length in enumerate((90, 50)):  # the first can only be cut by 64 rows less its window
        path = store.add(filled(model, TOKENS[:length]), TOKENS[:length], fingerprint=mark)
        os.utime(path, ns=(age, age))
    long = TOKENS * 2
    store.add(filled(model, long), long, fingerprint=mark)
    found = store.find([*TOKENS[:50], 1, 2], model, fingerprint=mark)
    assert found is not None and found[1] == TOKENS[:50]
    (store.folder / path.name).write_bytes(b"damaged")
    found = store.find([*TOKENS[:50], 1, 2], model, fingerprint=mark)
    assert found is not None and found[1] == TOKENS[:50]  # cut from the next longer one


def test_a_prefix_is_not_read_for_its_first_tokens(tmp_path):
    model = tiny_model()
    store, mark = PrefixStore(tmp_path), fingerprint(model)
    store.add(filled(model, TOKENS), TOKENS, fingerprint=mark)
    other = [49 - token for token in TOKENS]
    assert store.find([*TOKENS[:44], *other], model, fingerprint=mark) is None
    cache, held = store.find([*TOKENS[:45], *other], model, fingerprint=mark)
    assert held == TOKENS[:45]
    assert cache.nbytes <= 2 * filled(model, held).nbytes


def test_a_prefix_in_a_folder_that_may_only_be_read_is_used(tmp_path, monkeypatch):
    model = tiny_model()
    store, mark = PrefixStore(tmp_path), fingerprint(model)
    store.add(filled(model, TOKENS), TOKENS, fingerprint=mark)

    def refused(path, *_, **__):
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr(os, "utime", refused)
    assert store.find([*TOKENS, 1], model, fingerprint=mark) is not None


def test_a_chat_that_shares_only_its_first_tokens_looks_for_a_saved_prefix(tmp_path):
    model = tiny_model(*KINDS["windows"])
    store, mark = PrefixStore(tmp_path), fingerprint(model)
    store.add(filled(model, TOKENS), TOKENS, fingerprint=mark)
    reused = ReusedCache(
        model.make_cache,
        lambda prompt, held: store.find(prompt, model, fingerprint=mark, beyond=held),
    )
    for length in (6, 12):  # the second turn sets a mark
        kept = reused.start([*TOKENS[:3], *TOKENS[60 : 60 + length]])
        mx.eval(model(mx.array([reused.tokens[kept:]]), reused.cache))
    prompt = [*TOKENS, 1, 2]
    assert reused.start(prompt) == 90
    assert reused.cache.offset == 90 and not reused._marks
    got = model(mx.array([prompt[90:]]), reused.cache, last=1)
    wanted = model(mx.array([prompt]), last=1)
    np.testing.assert_allclose(np.array(got), np.array(wanted), atol=1e-4)


def test_a_prefix_is_not_read_for_what_is_held_already(tmp_path, monkeypatch):
    model = tiny_model()
    store, mark = PrefixStore(tmp_path), fingerprint(model)
    store.add(filled(model, TOKENS[:20]), TOKENS[:20], fingerprint=mark)
    reused = ReusedCache(
        model.make_cache,
        lambda prompt, held: store.find(prompt, model, fingerprint=mark, beyond=held),
    )
    assert reused.start(TOKENS[:60]) == 20
    mx.eval(model(mx.array([TOKENS[20:60]]), reused.cache))
    monkeypatch.setattr("mlxtx.cache.prefix_store.load_cache", None)  # would be a TypeError
    assert reused.start([*TOKENS[:20], 1, 2]) == 20  # the first question after the prefix, changed
    assert reused.cache.offset == 20
