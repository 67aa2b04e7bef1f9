"""Finding a checkpoint's files, and refusing what is not one."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxtx.checkpoint.source import INDEX, Checkpoint, read_config, read_json, weight_files
from mlxtx.errors import MlxtxError
from tests.checkpoint.builders import save, shard, write_llama

ONE = {"a": ("F32", np.ones(2, np.float32))}


def test_one_file_and_shards_hold_the_same(tmp_path):
    weights = write_llama(tmp_path)
    whole = Checkpoint(tmp_path)
    assert whole.files == ["model.safetensors"] and set(whole.tensors) == set(weights)
    assert whole.nbytes == sum(w.nbytes for w in weights.values())
    shard(tmp_path, 3)
    parts = Checkpoint(tmp_path)
    assert len(parts.files) == 3
    for name, weight in weights.items():
        assert np.array_equal(np.array(parts.read(name)), weight)
    (tmp_path / INDEX).unlink()
    assert Checkpoint(tmp_path).files == parts.files
    (tmp_path / parts.files[1]).unlink()
    with pytest.raises(MlxtxError, match=f"lacks {parts.files[1]} of 3 weight files"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "a" * 300 + ".safetensors",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "C:\\x.safetensors",
        "..\\x.safetensors",
        "\\\\host\\x.safetensors",
        "x.bin",
        "",
        None,
        7,
        ["x.safetensors"],
        "x\n.safetensors",
    ],
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, file):
    write_llama(tmp_path / "model")
    save(tmp_path / "x.safetensors", ONE)
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(MlxtxError, match="not a weight file in its own folder"):
        Checkpoint(tmp_path / "model")


def test_an_index_must_tell_the_truth(tmp_path):
    write_llama(tmp_path)
    for value, message in (
        ({"weight_map": {"nothing": "model.safetensors"}}, "promises 'nothing'"),
        (
            {"weight_map": {"a": "other.safetensors"}},
            "lacks other.safetensors .*; if model.safetensors",
        ),
        ({"weight_map": {}}, "no weight_map"),
        ([], "no weight_map"),
    ):
        (tmp_path / INDEX).write_text(json.dumps(value))
        with pytest.raises(MlxtxError, match=message):
            Checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for n in (1, 2):
        save(tmp_path / f"model-0000{n}-of-00002.safetensors", ONE)
    with pytest.raises(MlxtxError, match="tensor a is in both"):
        Checkpoint(tmp_path)


def test_pickles_and_strangers_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MlxtxError, match="holds no safetensors weights"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(MlxtxError, match=r"can run code.*save_pretrained"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    save(tmp_path / "consolidated.safetensors", ONE)
    with pytest.raises(MlxtxError, match=r"consolidated\.safetensors only"):
        weight_files(tmp_path)
    for name in ("one.safetensors", "two.safetensors"):
        save(tmp_path / name, ONE)
    with pytest.raises(MlxtxError, match="several weight files"):
        weight_files(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    assert weight_files(tmp_path) == ["one.safetensors"]


def test_config_json(tmp_path):
    with pytest.raises(MlxtxError, match=r"no config\.json"):
        read_config(tmp_path)
    path = tmp_path / "config.json"
    for text, message in (("{", "not readable JSON"), ("[]", "must hold a JSON object")):
        path.write_text(text)
        with pytest.raises(MlxtxError, match=message):
            read_config(tmp_path)
    path.write_bytes(b"\xff")
    with pytest.raises(MlxtxError, match="not UTF-8 text"):
        read_config(tmp_path)
    path.write_text('{"clip": {"__float__": "Infinity"}, "x": {"__float__": "1"}}')
    assert read_config(tmp_path) == {"clip": math.inf, "x": {"__float__": "1"}}


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=40) | st.text('[{"a:1,]}\\', max_size=40).map(str.encode))
def test_json_reading_never_crashes(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    try:
        value = read_json(tmp_path / "x.json")
    except MlxtxError as error:
        assert "x.json" in str(error)
    else:
        assert repr(value) == repr(json.loads(content.decode()))


def test_code_beside_the_weights_is_never_run(tmp_path):
    write_llama(tmp_path, auto_map={"AutoModelForCausalLM": "modeling.Model"}, model_file="evil.py")
    for name in ("modeling.py", "evil.py", "conftest.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    checkpoint = Checkpoint(tmp_path)
    mx.eval([checkpoint.read(name) for name in checkpoint.tensors])
    assert not (tmp_path / "ran").exists()
