from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxtx.errors import MlxtxError
from mlxtx.text.tokenizer import Tokenizer, check_messages
from tests.text.vocabularies import byte_fallback, byte_level, sentencepiece_model


def write(folder: Path, **files) -> Path:
    """``name=value`` becomes name.json; bytes and text are written as they are."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def fast(folder: Path, build=byte_level, **files) -> Tokenizer:
    build().save(str(folder / "tokenizer.json"))
    return Tokenizer.load(write(folder, **files))


def test_eos_ids_come_from_all_three_places(tmp_path):
    tokenizer = fast(
        tmp_path,
        generation_config={"eos_token_id": [7, 9]},
        config={"eos_token_id": 11, "text_config": {"eos_token_id": [12, None]}},
        tokenizer_config={"eos_token": {"content": "</s>", "lstrip": False}},
    )
    assert tokenizer.eos_ids == {7, 9, 11, 12, 1}


def test_no_eos_anywhere(tmp_path):
    assert fast(tmp_path, config={"eos_token_id": None}).eos_ids == frozenset()


def test_special_tokens_map_names_what_the_config_does_not(tmp_path):
    tokenizer = fast(
        tmp_path, special_tokens_map={"bos_token": "<s>", "pad_token": {"content": "</s>"}}
    )
    assert (tokenizer.bos_id, tokenizer.pad_id) == (0, 1)


@pytest.mark.parametrize(
    ("flags", "ends"),
    [
        ({}, ([0], [])),
        ({"add_bos_token": False}, ([], [])),
        ({"add_bos_token": True, "add_eos_token": True}, ([0], [1])),
        ({"add_eos_token": False}, ([0], [])),
        ({"add_eos_token": True}, ([0], [1])),
        ({"add_bos_token": True}, ([0], [])),
    ],
)
def test_who_adds_the_begin_token(tmp_path, flags, ends):
    """The tokenizer.json's own rule, unless tokenizer_config.json speaks."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = fast(tmp_path, byte_fallback, tokenizer_config={**names, **flags})
    bare = tokenizer.encode("The lamp", add_special=False)
    assert tokenizer.encode("The lamp") == [*ends[0], *bare, *ends[1]]
    assert not {0, 1} & set(bare)


def test_saved_truncation_and_padding_are_ignored(tmp_path):
    inner = byte_level()
    inner.enable_truncation(3)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    text = "The lamp on the table was still warm"
    assert Tokenizer.load(tmp_path).decode(Tokenizer.load(tmp_path).encode(text)) == text
    assert len(Tokenizer.load(tmp_path).encode("a")) == 1


def test_added_tokens_that_tokenizer_json_lacks(tmp_path):
    size = byte_level().get_vocab_size()
    added = {str(size): {"content": "<|late|>", "special": True}}
    tokenizer = fast(tmp_path, tokenizer_config={"added_tokens_decoder": added})
    assert tokenizer.encode("a<|late|>b")[1:-1] == [size]
    assert tokenizer.decode(tokenizer.encode("a<|late|>b")) == "ab"


def flagged(folder: Path, content: str, flags: dict | None, **files) -> Tokenizer:
    """``tokenizer.json`` with other flags of one added token; with None it is an ordinary piece."""
    inner = json.loads(byte_level().to_str())
    tokens = inner["added_tokens"]
    inner["added_tokens"] = [t for t in tokens if t["content"] != content or flags is not None]
    for token in inner["added_tokens"]:
        token.update(flags or {} if token["content"] == content else {})
    (folder / "tokenizer.json").write_text(json.dumps(inner), encoding="utf-8")
    return Tokenizer.load(write(folder, **files))


@pytest.mark.parametrize("flags", [None, {"special": False}, {"special": True}])
def test_a_named_token_is_special_whatever_tokenizer_json_says(tmp_path, flags):
    """It is found in a text, and does not show when decoded."""
    names = {"eos_token": "</s>", "pad_token": "<|not there|>"}
    tokenizer = flagged(tmp_path, "</s>", flags, tokenizer_config=names)
    ids = tokenizer.encode("lamp</s>a")
    assert ids.count(1) == 1 and len(tokenizer) == byte_level().get_vocab_size()
    assert tokenizer.decode(ids) == "lampa"
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == "lampa"
    assert tokenizer.decode(ids, skip_special=False) == "lamp</s>a"


@pytest.mark.parametrize("before", [True, False])
def test_flags_of_the_config_count(tmp_path, before):
    added = {"2": {"content": "<|turn|>", "special": True, "rstrip": True}}
    config = {"added_tokens_decoder": added}
    tokenizer = flagged(tmp_path, "<|turn|>", {"special": before}, tokenizer_config=config)
    ids = tokenizer.encode("a<|turn|> b")
    assert ids == [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "ab"
    # The older file gives ids alone: it takes nothing back.
    older = flagged(tmp_path, "<|turn|>", {"special": True}, added_tokens={"<|turn|>": 2})
    assert older.decode([2]) == ""


def test_an_added_token_with_another_id_is_an_error(tmp_path):
    with pytest.raises(MlxtxError, match=r"has the id 9999 in tokenizer_config.json"):
        fast(
            tmp_path,
            tokenizer_config={"added_tokens_decoder": {"9999": {"content": "<|late|>"}}},
        )


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(MlxtxError, match=r"no tokenizer.json and no tokenizer.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model at all")
    with pytest.raises(MlxtxError, match="not a sentencepiece model"):
        Tokenizer.load(tmp_path)
    sentencepiece_model(tmp_path)
    sound = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(sound.replace("▁".encode(), b"\xbd\xbd\xbd"))
    with pytest.raises(MlxtxError, match="not a sentencepiece model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(MlxtxError, match=r"not a readable tokenizer.json"):
        Tokenizer.load(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(MlxtxError, match="must hold a JSON object"):
        Tokenizer.load(tmp_path)


def test_half_a_character_counts_as_a_broken_one(tmp_path):
    tokenizers = [fast(tmp_path), None]
    (tmp_path / "tokenizer.json").unlink()
    sentencepiece_model(tmp_path)
    tokenizers[1] = Tokenizer.load(tmp_path)
    for tokenizer in tokenizers:
        for text, same in (("a\ud800 b", "a\ufffd b"), ("\ud83d\udc4d", "👍"), ("\ufeffa\0", None)):
            ids = tokenizer.encode(text, add_special=False)
            assert ids == tokenizer.encode(same or text, add_special=False) and ids
            assert tokenizer.decode(ids).strip() == (same or text).strip()


# --- tokenizer.model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece_model(folder)
    return folder


def plain_sentencepiece(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="aelTh  \n▁é你👍<0x>", max_size=25))
def test_text_is_split_as_sentencepiece_does(folder, text):
    tokenizer, reference = Tokenizer.load(folder), plain_sentencepiece(folder)
    ids = tokenizer.encode(text, add_special=False)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids)
    if "▁" not in text and "<0x" not in text:
        assert tokenizer.decode(ids) == text


def test_begin_token_by_default(folder):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("The")[0] == tokenizer.bos_id == plain_sentencepiece(folder).bos_id()
    assert tokenizer.eos_ids == {plain_sentencepiece(folder).eos_id()}


def with_added(tmp_path: Path, folder: Path, **config) -> Tokenizer:
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    size = plain_sentencepiece(folder).get_piece_size()
    added = {
        str(size): {"content": "<|turn|>", "special": True},
        str(size + 1): {"content": "<tool>", "special": False, "rstrip": True},
    }
    return Tokenizer.load(
        write(tmp_path, tokenizer_config={"added_tokens_decoder": added, **config})
    )


def test_added_tokens_are_cut_out_first(tmp_path, folder):
    tokenizer = with_added(tmp_path, folder)
    reference = plain_sentencepiece(folder)
    size = reference.get_piece_size()
    bos, eos = reference.bos_id(), reference.eos_id()
    text = "<s><|turn|>lamp</s><tool>  lamp"
    ids = tokenizer.encode(text, add_special=False)
    bare = [reference.piece_to_id(piece) for piece in pieces_without_space(reference, "lamp")]
    assert ids == [bos, size, *bare, eos, size + 1, *bare]
    assert tokenizer.decode(ids) == "lamp<tool>lamp"
    assert tokenizer.decode(ids, skip_special=False) == "<s><|turn|>lamp</s><tool>lamp"
    assert len(tokenizer) == size + 2


def test_a_named_token_of_a_sentencepiece_model_is_special(tmp_path, folder):
    size = plain_sentencepiece(folder).get_piece_size()
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    files = {"added_tokens": {"<|end|>": size}, "special_tokens_map": {"eos_token": "<|end|>"}}
    tokenizer = Tokenizer.load(write(tmp_path, **files))
    assert tokenizer.decode(tokenizer.encode("lamp<|end|>")) == "lamp"
    assert tokenizer.decode([size], skip_special=False) == "<|end|>"


def test_an_added_token_takes_the_space_before_it(tmp_path, folder):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    size = plain_sentencepiece(folder).get_piece_size()
    added = {
        str(size): {"content": "<mask>", "lstrip": True},
        str(size + 1): {"content": ""},  # is in every text everywhere
    }
    config = {"added_tokens_decoder": added}
    tokenizer = Tokenizer.load(write(tmp_path, tokenizer_config=config))
    lamp = tokenizer.encode("lamp", add_special=False)
    assert size + 1 not in lamp
    for space in (" ", "\n \t", " " * 200_000):  # the square of the last would take hours
        ids = tokenizer.encode(f"lamp{space}<mask>", add_special=False)
        assert ids == [*lamp, size]
    assert tokenizer.encode("  <mask><mask>", add_special=False) == [size, size]
    kept = tokenizer.encode(f"lamp{' ' * 200_000}lamp", add_special=False)
    assert size not in kept and len(kept) >= 2 * len(lamp)


def pieces_without_space(reference, word: str) -> list[str]:
    """The pieces of a word in the middle of a text: a newline before it takes the space."""
    pieces = reference.encode("\n" + word, out_type=str)
    return pieces[[piece.endswith("\n") for piece in pieces].index(True) + 1 :]


def test_leading_space_rule(tmp_path, folder):
    """Only the start of the text gets the space; with ``legacy`` every part does."""
    reference = plain_sentencepiece(folder)
    spaced = reference.encode("lamp")
    turn = reference.get_piece_size()
    new = with_added(tmp_path, folder).encode("lamp<|turn|>lamp", add_special=False)
    assert new[: len(spaced)] == spaced and new[len(spaced)] == turn
    assert new[len(spaced) + 1 :] != spaced
    old = with_added(tmp_path, folder, legacy=True).encode("lamp<|turn|>lamp", add_special=False)
    assert old == [*spaced, turn, *spaced]


def test_a_model_without_the_leading_space(tmp_path):
    sentencepiece_model(tmp_path, leading_space=False)
    tokenizer = Tokenizer.load(tmp_path)
    for text in (" lamp", "lamp"):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == plain_sentencepiece(tmp_path).encode(text)
        assert tokenizer.decode(ids) == text


# --- chat -----------------------------------------------------------------------------------

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.content }}</s>{% endfor %}"
HELLO = [{"role": "user", "content": "lamp"}]


def test_template_string_and_ids(tmp_path):
    config = {"bos_token": "<s>", "add_bos_token": True, "chat_template": TEMPLATE}
    tokenizer = fast(tmp_path, tokenizer_config=config)
    assert tokenizer.render_chat(HELLO) == "<s><|turn|>lamp</s>"
    ids = tokenizer.encode_chat(HELLO)
    assert ids[:2] == [0, 2] and ids[-1] == 1 and ids.count(0) == 1


def test_where_templates_come_from(tmp_path):
    named = [{"name": "default", "template": "list"}, {"name": "rag", "template": "rag"}]
    tokenizer = fast(tmp_path, tokenizer_config={"chat_template": named})
    assert tokenizer.render_chat(HELLO) == "list"
    assert tokenizer.render_chat(HELLO, name="rag") == "rag"
    (tmp_path / "chat_template.jinja").write_text("file é", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.render_chat(HELLO) == "file é"
    assert tokenizer.render_chat(HELLO, tools=[{"name": "x"}]) == "tools"


def test_without_a_template_plain_lines(tmp_path):
    tokenizer = fast(tmp_path)
    assert tokenizer.chat_template is None
    assert tokenizer.decode(tokenizer.encode_chat(HELLO)) == "user: lamp\nassistant:"


@pytest.mark.parametrize(
    "messages", [[], ["hi"], [{"content": "x"}], [{"role": "user"}], [{"role": 3, "content": ""}]]
)
def test_bad_messages(messages):
    with pytest.raises(MlxtxError):
        check_messages(messages)
