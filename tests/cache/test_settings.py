"""The spelling of cache settings, and what is refused."""

from __future__ import annotations

import pytest

from mlxtx.cache.settings import KVSettings, kv_from_bits, parse_kv
from mlxtx.errors import MlxtxError


def test_spellings_are_read_and_written():
    assert parse_kv(None) == parse_kv("plain") == KVSettings()
    assert parse_kv("K8V4") == KVSettings(key_bits=8, value_bits=4, group_size=64)
    everything = "k4v3g32rf4n128w4096s2"
    assert parse_kv(everything) == KVSettings(
        key_bits=4,
        value_bits=3,
        group_size=32,
        rotate=True,
        first=4,
        newest=128,
        window=4096,
        sink_tokens=2,
    )
    for text in ("plain", "k8v4g64", "k2v2g32r", everything, "w512", "w512s4", "k6v5g64n9"):
        assert str(parse_kv(text)) == text
    assert str(kv_from_bits("8")) == "k8v8g64"
    assert str(kv_from_bits("6,3")) == "k6v3g64"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("k7v4", "keys of a cache can have 2, 3, 4, 5, 6, 8 bits, not 7"),
        ("k8v16", "values of a cache can have .* not 16"),
        ("k4v4g48", "groups of a cache have 32 or 64 channels, not 48"),
        ("k4", "can't read the cache setting 'k4'"),
        ("q8_0", "can't read"),
        ("n128", "belong to a quantized cache"),
        ("w0", "a window of 0 tokens"),
    ],
)
def test_impossible_settings_are_refused(text, says):
    with pytest.raises(MlxtxError, match=says):
        parse_kv(text)


def test_bits_that_are_no_bits():
    for text in ("8,4,2", "eight", ""):
        with pytest.raises(MlxtxError, match="can't read the bits"):
            kv_from_bits(text)
    with pytest.raises(MlxtxError, match="not 7"):
        kv_from_bits("7")
