"""The streaming detokenizer against the libraries' own decoding of the whole sequence."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxtx.text.backends import SentencePieces, TokenizersPieces
from mlxtx.text.tokenizer import Tokenizer
from tests.text.vocabularies import KINDS, byte_level, sentencepiece_model


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    made = {}
    for name, build in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        build().save(str(folder / "tokenizer.json"))
        made[name] = Tokenizer(TokenizersPieces(folder / "tokenizer.json", {}))
    for name, options in {
        "sentencepiece": {},
        "sentencepiece_plain": {"leading_space": False},
        "sentencepiece_unigram": {"kind": "unigram", "collapse": True},
    }.items():
        folder = tmp_path_factory.mktemp(name)
        file = sentencepiece_model(folder, **options)
        made[name] = Tokenizer(SentencePieces(file, {}, legacy=False))
    return made


NAMES = [*KINDS, "sentencepiece", "sentencepiece_plain", "sentencepiece_unigram"]


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> list[str]:
    stream = tokenizer.stream(skip_special=skip_special)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_stream_to_the_whole_decode(tokenizers, name, data):
    tokenizer = tokenizers[name]
    # A few ids beyond the vocabulary too: models pad theirs.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "sentencepiece"])
@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="aé你👍🏽 \n<e", max_size=30))
def test_real_text_never_shows_half_a_character(tokenizers, name, text):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text, add_special=False)
    pieces = streamed(tokenizer, ids, True)
    assert not any("�" in piece for piece in pieces)
    whole = tokenizer.decode(ids)
    assert "".join(pieces) == whole
    if name != "byte_fallback":  # its few pieces cannot write every character
        assert whole == text


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=24))
def test_broken_bytes_decode_as_the_library_does(tokenizers, data):
    tokenizer = tokenizers["byte_fallback"]
    ids = [tokenizer.id_of(f"<0x{byte:02X}>") for byte in data]
    assert "".join(streamed(tokenizer, ids, True)) == tokenizer.pieces.inner.decode(ids)


def test_a_byte_run_is_shown_when_it_ends(tokenizers):
    tokenizer = tokenizers["byte_fallback"]
    ids = [tokenizer.id_of(f"<0x{byte:02X}>") for byte in "好".encode()]
    end = tokenizer.id_of("▁on")
    assert streamed(tokenizer, [*ids, end], True) == ["", "", "", "好 on", ""]


def test_byte_level_shows_a_character_with_its_last_byte(tokenizers):
    tokenizer = tokenizers["byte_level"]
    stand_in = {byte: piece for piece, byte in _alphabet().items()}
    ids = [tokenizer.id_of(stand_in[byte]) for byte in "👍".encode()]
    assert streamed(tokenizer, ids, True) == ["", "", "", "👍", ""]


def _alphabet():
    from mlxtx.text.pieces import ByteLevel

    return ByteLevel.ALPHABET


def test_unfinished_character_is_not_lost(tokenizers):
    tokenizer = tokenizers["byte_level"]
    stand_in = {byte: piece for piece, byte in _alphabet().items()}
    ids = [tokenizer.id_of("a"), *(tokenizer.id_of(stand_in[b]) for b in "👍".encode()[:2])]
    assert streamed(tokenizer, ids, True) == ["a", "", "", "�"]
    assert tokenizer.decode(ids) == "a�"


def calls_made(function) -> int:
    """Python and C calls while ``function`` runs: work that does not depend on the clock."""
    count = 0

    def count_call(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(count_call)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "metaspace", "sentencepiece"])
def test_work_grows_linearly_over_a_long_reply(tokenizers, name):
    tokenizer = tokenizers[name]
    size = len(tokenizer)

    def reply(length: int) -> tuple[int, int]:
        ids = [(index * 7919) % size for index in range(length)]
        stream = tokenizer.stream()
        shown = 0

        def run() -> None:
            nonlocal shown
            for token in ids:
                shown += len(stream.push(token))
            shown += len(stream.finish())

        return calls_made(run), shown

    short_calls, short_shown = reply(1_000)
    long_calls, long_shown = reply(32_000)
    assert long_calls <= 32 * short_calls * 1.05
    # No character is produced twice: what was shown is exactly the text.
    assert long_shown == len(tokenizer.decode([(i * 7919) % size for i in range(32_000)]))
    assert short_shown > 0


def test_endless_bytes_stay_linear(tokenizers):
    """A model stuck on one broken byte must not make each token dearer than the last."""
    tokenizer = Tokenizer(tokenizers["byte_level"].pieces)
    token = tokenizer.id_of({b: p for p, b in _alphabet().items()}[0xF0])

    def run(length: int) -> int:
        stream = tokenizer.stream()
        return calls_made(lambda: [stream.push(token) for _ in range(length)])

    assert run(32_000) <= 32 * run(1_000) * 1.05


def test_byte_level_alphabet_is_the_library_s():
    from tokenizers import pre_tokenizers

    assert set(_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_alphabet().values()) == list(range(256))
    tokenizer = byte_level()
    for character, byte in _alphabet().items():
        assert tokenizer.decode([tokenizer.token_to_id(character)]) == bytes([byte]).decode(
            "utf-8", "replace"
        )
