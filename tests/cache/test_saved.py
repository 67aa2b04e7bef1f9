"""Saved caches, what is refused, and prefixes on disk."""

from __future__ import annotations

import errno
import functools
import json
import os
import struct
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxtx.cache.fingerprint import fingerprint, weights_mark
from mlxtx.cache.prefix_store import PrefixStore
from mlxtx.cache.reuse import ReusedCache
from mlxtx.cache.saved import load_cache, read_cache_info, save_cache
from mlxtx.errors import MlxtxError
from tests.cache.tiny_models import KINDS, tiny_model

TOKENS = np.random.default_rng(4).integers(0, 50, 90).tolist()


def filled(model, tokens, kv=None):
    cache = model.make_cache(kv)
    model(mx.array([tokens]), cache)
    return cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", ["plain", "k8v4g32r", "k4v4g32f2n8"])
def test_a_loaded_cache_goes_on_alike(kind, kv, tmp_path):
    model = tiny_model(*KINDS[kind])
    cache = filled(model, TOKENS[:70], kv)
    mark = fingerprint(model)
    save_cache(tmp_path / "a", cache, model=mark, tokens=[TOKENS[:70]], title="a story")
    loaded, tokens = load_cache(tmp_path / "a", model, fingerprint=mark, kv=kv)
    assert tokens == [TOKENS[:70]]
    for some in (cache, loaded):
        some.rollback(3)
    more = mx.array([TOKENS[67:80]])
    np.testing.assert_array_equal(np.array(model(more, loaded)), np.array(model(more, cache)))
    info = read_cache_info(tmp_path / "a")
    assert (info.title, info.settings, info.offset) == ("a story", kv, 70)
    assert info.nbytes < cache.nbytes + 8000  # only rows that are filled


def test_bfloat16_rows_come_back_exactly(tmp_path):
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    cache = filled(model, TOKENS, "k8v8g32n5")
    save_cache(tmp_path / "a", cache, model="m", tokens=[TOKENS])
    loaded, _ = load_cache(tmp_path / "a", model, fingerprint="m")
    for a, b in zip(cache.layers[0].body.parts(), loaded.layers[0].body.parts(), strict=True):
        assert b.keys.scales.dtype == mx.bfloat16
        assert mx.array_equal(a.keys.codes, b.keys.codes)
        assert mx.array_equal(a.values.scales, b.values.scales)


def test_foreign_and_damaged_files_are_refused(tmp_path):
    model = tiny_model()
    mark = fingerprint(model)
    path = tmp_path / "a"
    save_cache(path, filled(model, TOKENS, "k8v4g32"), model=mark, tokens=[TOKENS])
    with pytest.raises(MlxtxError, match="another model, revision, quantization or adapter"):
        load_cache(path, model, fingerprint=fingerprint(tiny_model(seed=1)))
    with pytest.raises(MlxtxError, match=r"keeps rows as k8v4g32, and k8v8g32 was asked"):
        load_cache(path, model, fingerprint=mark, kv="k8v8g32")
    whole = path.read_bytes()
    for length in (0, 5, 300, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(MlxtxError):
            load_cache(path, model, fingerprint=mark)
    path.write_bytes(whole.replace(b"mlxtx-cache-2", b"mlxtx-cache-7"))
    with pytest.raises(MlxtxError, match="not a cache of this version"):
        load_cache(path, model, fingerprint=mark)
    path.write_bytes(
        whole.replace(b'\\"stop\\":90', b'\\"stop\\":80').replace(
            b'\\"stop\\": 90', b'\\"stop\\": 80'
        )
    )
    with pytest.raises(MlxtxError, match="does not hold what its header says"):
        load_cache(path, model, fingerprint=mark)


def test_rows_of_another_width_or_type_are_refused(tmp_path):
    model = tiny_model()
    for old, new in (
        (b"[16, 16]", b"[16, 80]"),
        (b"float32", b"float16"),
        (b"float32", b"float99"),
    ):
        path = tmp_path / "a"
        save_cache(path, filled(model, TOKENS, "k8v4g32"), model="m", tokens=[TOKENS])
        whole = path.read_bytes()
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(MlxtxError, match="does not hold what its header says"):
            load_cache(path, model, fingerprint="m")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), kv=st.booleans())
def test_a_changed_byte_is_an_error_or_a_cache(where, byte, kv):
    """Whatever a header says, loading ends with a message or with a cache that can be used."""
    model, whole = damaged_source("k8v4g32n5" if kv else "plain")
    (length,) = struct.unpack("<Q", whole[:8])
    at = int(where * (length + 8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        try:
            cache, tokens = load_cache(path, model, fingerprint="m")
        except MlxtxError:
            return
        assert cache.offset == len(tokens[0]) == 20


@functools.cache
def damaged_source(kv):
    model = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        save_cache(
            Path(folder) / "a", filled(model, TOKENS[:20], kv), model="m", tokens=[TOKENS[:20]]
        )
        return model, (Path(folder) / "a").read_bytes()


def without_values(header, data):
    """The file's last tensor taken out, and the header told."""
    start, stop = header.pop("layers.1.body.values")["data_offsets"]
    assert stop == len(data)
    return data[:start]


def says(name, value):
    def change(header, data):
        header["__metadata__"][name] = value
        return data

    return change


def moved(**facts):
    def change(header, data):
        segments = json.loads(header["__metadata__"]["segments"])
        for segment in segments.values():
            segment.update(facts)
        return says("segments", json.dumps(segments))(header, data)

    return change


@pytest.mark.parametrize(
    "change",
    [
        without_values,
        moved(origin=4, oldest=4, stop=24, newest=24),
        moved(oldest=10, stop=30, newest=30),
        moved(newest=5000),
        says("rewind", "-8"),
        says("left_padding", "[-4]"),
        says("left_padding", "[1, 2]"),
        says("left_padding", '["a"]'),
        says("left_padding", "[" * 5000),
        says("segments", "[" * 5000),
    ],
)
def test_a_header_that_does_not_fit_its_rows_is_refused(change, tmp_path):
    model, path = tiny_model(*KINDS["windows"][:2]), tmp_path / "a"
    save_cache(path, filled(model, TOKENS[:20]), model="m", tokens=[TOKENS[:20]])
    load_cache(path, model, fingerprint="m")
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    data = change(header, whole[8 + length :])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(MlxtxError, match="does not"):
        load_cache(path, model, fingerprint="m")


def test_rows_that_are_missing_are_noticed(tmp_path):
    model = tiny_model()
    cache = filled(model, TOKENS[:12])
    cache.offset = 20
    save_cache(tmp_path / "a", cache, model="m", tokens=[TOKENS[:20]])
    with pytest.raises(MlxtxError, match="does not hold 20 rows"):
        load_cache(tmp_path / "a", model, fingerprint="m")


def test_the_fingerprint_tells_models_apart():
    model = tiny_model()
    mark = fingerprint(model)
    assert fingerprint(tiny_model()) == mark
    assert fingerprint(tiny_model(seed=1)) != mark
    assert fingerprint(tiny_model(*KINDS["full"])) != mark
    model.layers[1].self_attn.q_proj.weight += 0.01
    assert fingerprint(model) != mark


def test_the_mark_of_weights_takes_no_copy_of_them():
    wide = mx.random.normal((256, 4096))
    told = {"plain": wide, "transposed": wide.T, "number": mx.array(2.0)}
    mx.eval(told)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mark = weights_mark(told)
    assert mx.get_peak_memory() - before < wide.nbytes // 8
    # More numbers than one axis can have, of which all are one: nothing is held.
    assert weights_mark({**told, "long": mx.broadcast_to(mx.zeros(()), (1 << 16, 1 << 16))}) != mark
    assert weights_mark({**told, "transposed": mx.contiguous(wide.T)}) == mark


def test_the_mark_of_weights_looks_at_more_than_one_column():
    weight = mx.random.normal((256, 4096))
    other = mx.concatenate([weight[:, :1], weight[:, 1:] + 0.01], axis=1)
    assert weights_mark({"weight": weight}) != weights_mark({"weight": other})


def test_the_fingerprint_holds_the_scale_of_an_adapter():
    from mlxtx.tuning.lora import LowRank
    from mlxtx.tuning.targets import add_adapters

    marks = []
    for scale in (1.0, 1.0, 2.0):
        model = tiny_model()
        add_adapters(model, {"model.layers.1.self_attn.q_proj": LowRank(rank=2, scale=scale)})
        marks.append(fingerprint(model))
    assert marks[0] == marks[1] != marks[2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_keeps_the_old_file(number, tmp_path, monkeypatch):
    from mlxtx.checkpoint import safetensors

    model = tiny_model()
    path = tmp_path / "a"
    save_cache(path, filled(model, TOKENS), model="m", tokens=[TOKENS])
    before = path.read_bytes()

    def full(file, array):
        raise OSError(number, "no room at all")

    monkeypatch.setattr(safetensors, "write_array", full)
    with pytest.raises(MlxtxError, match=r"disk is full: .*no room at all"):
        save_cache(path, filled(model, TOKENS[:9]), model="m", tokens=[TOKENS[:9]])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_prefixes_on_disk_stay_within_their_budget(tmp_path):
    model = tiny_model()
    mark = fingerprint(model)
    size = (
        PrefixStore(tmp_path / "x")
        .add(filled(model, TOKENS[:60]), TOKENS[:60], fingerprint=mark)
        .stat()
        .st_size
    )
    store = PrefixStore(tmp_path / "y", budget=2 * size + size // 2)
    for first in (1, 2, 3):
        tokens = [first, *TOKENS[1:60]]
        path = store.add(filled(model, tokens), tokens, fingerprint=mark, title=str(first))
        os.utime(path, ns=(first, first))
    assert [info.title for info in store] == ["2", "3"]
    assert store.nbytes <= store.budget
    with pytest.raises(MlxtxError, match="raise the"):
        store.add(filled(model, TOKENS * 4), TOKENS * 4, fingerprint=mark)
    assert [info.title for info in store] == ["2", "3"]  # nothing left for what did not fit
    with pytest.raises(MlxtxError, match="no saved cache begins"):
        store.remove("zzz")
    store.remove(next(iter(store)).path.name)
    assert [info.title for info in store] == ["3"]


def test_a_prefix_is_found_and_used(tmp_path):
    model = tiny_model(*KINDS["full"])
    mark = fingerprint(model)
    store = PrefixStore(tmp_path)
    for length in (20, 60):
        store.add(filled(model, TOKENS[:length]), TOKENS[:length], fingerprint=mark)
    store.add(filled(model, TOKENS[:70], "k8v8g32"), TOKENS[:70], fingerprint=mark)
    cache, held = store.find([*TOKENS[:40], 1, 2, 3], model, fingerprint=mark)
    assert held == TOKENS[:40] and cache.offset == 40
    wanted = model(mx.array([TOKENS[:43]]), last=1)
    got = model(mx.array([TOKENS[40:43]]), cache, last=1)
    np.testing.assert_allclose(np.array(got), np.array(wanted), atol=1e-4)
    assert store.find(TOKENS, model, fingerprint="other") is None
    assert store.find([49 - t for t in TOKENS], model, fingerprint=mark) is None
    found = store.find(TOKENS, model, fingerprint=mark, kv="k8v8g32")
    assert found is not None and len(found[1]) == 70


def test_marks_of_a_wide_window_stay_within_their_bytes(monkeypatch):
    model = tiny_model(*KINDS["windows"])
    reused = ReusedCache(model.make_cache)

    def turns(count):
        reused.reset()
        for turn in range(1, count + 1):
            prompt = TOKENS[: 6 * turn]
            kept = reused.start(prompt)
            mx.eval(model(mx.array([prompt[kept:]]), reused.cache))
        return [mark.nbytes for mark in reused._marks]

    sizes = turns(10)
    assert len(sizes) == 9 and min(sizes) > 0
    monkeypatch.setattr("mlxtx.cache.reuse.MARK_BYTES", sum(sizes[-3:]))
    assert turns(10) == sizes[-3:]
    monkeypatch.setattr("mlxtx.cache.reuse.MARK_BYTES", 0)
    assert turns(10) == sizes[-1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", ["plain", "k8v8g32n4"])
def test_a_chat_feeds_only_what_is_new(kind, kv):
    model = tiny_model(*KINDS[kind])
    reused = ReusedCache(lambda: model.make_cache(kv, rewind=2))
    fed = []

    def turn(prompt, reply):
        kept = reused.start(prompt)
        fed.append(len(prompt) - kept)
        out = model(mx.array([prompt[kept:]]), reused.cache, last=1)
        for token in reply:
            model(mx.array([[token]]), reused.cache)
            reused.tokens.append(token)
        return np.array(out)

    first, second = TOKENS[:50], [*TOKENS[:50], 3, 4, 5, *TOKENS[60:70]]
    turn(first, [3, 4, 5])
    assert fed == [50]
    turn(second, [6, 7])
    assert fed[-1] == 10
    edited = [*TOKENS[:50], 3, 4, 5, *reversed(TOKENS[60:70]), 1]  # the second message again
    got = turn(edited, [])
    assert fed[-1] <= 11
    alone = model.make_cache("plain" if kv == "plain" else "k8v8g32")
    wanted = np.array(model(mx.array([edited]), alone, last=1))
    np.testing.assert_allclose(got, wanted, atol=1e-4 if kv == "plain" else 0.1)
    turn([8, *first], [])  # nothing in common
    assert fed[-1] == 51
    turn([8, *first], [])  # the very same prompt: one token has to be fed for its logits
    assert fed[-1] == 1
    model(mx.array([[1, 2]]), reused.cache)  # a turn cut short, nobody told
    assert reused.start([8, *first, 9]) == 51
