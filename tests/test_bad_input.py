"""What a user can get wrong: one line on stderr, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlxtx.cli import main
from mlxtx.errors import MlxtxError
from tests.tiny_model import tiny_folder


def change_config(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(config))

    return change


def change_weights(change_them: Callable[[dict], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = str(folder / "model.safetensors")
        weights = dict(mx.load(path))
        change_them(weights)
        mx.eval(weights)
        mx.save_safetensors(path, weights)

    return change


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_bytes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 not what it says" * 100)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def index_outside(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    names = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing(weights: dict) -> None:
    del weights["model.norm.weight"]
    del weights["model.layers.0.mlp.up_proj.weight"]


def unexpected(weights: dict) -> None:
    weights["model.layers.0.extra.weight"] = mx.zeros((2,))


def misshapen(weights: dict) -> None:
    weights["model.norm.weight"] = mx.zeros((3,))


def broken_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users\\nhere') }}")


def change_tokenizer(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def index_that_names_a_link(folder: Path) -> None:
    names = list(mx.load(str(folder / "model.safetensors")))
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to("../outside.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def renamed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def whole_numbers(weights: dict) -> None:
    weights["model.norm.weight"] = mx.ones((64,), mx.int32)


def packed_by_half(weights: dict) -> None:
    packed, scales, _ = mx.quantize(weights["lm_head.weight"], 64, 4)
    weights |= {"lm_head.weight": packed, "lm_head.scales": scales}


ROPE = {"rope_type": "linear", "factor": "two"}
CASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "unknown family": (change_config(model_type="lama"), ["lama", "llama"]),
    "a family by its own code": (
        change_config(model_type="mine", auto_map={"AutoModel": "modeling_mine.Mine"}),
        ["'mine' is not supported", "never run"],
    ),
    "missing tensors": (
        change_weights(missing),
        ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"],
    ),
    "unexpected tensor": (change_weights(unexpected), ["model.layers.0.extra.weight"]),
    "misshapen tensor": (change_weights(misshapen), ["model.norm.weight", "3", "64"]),
    "unknown key": (change_config(rope_twist=3), ["rope_twist"]),
    "truncated file": (cut, ["model.safetensors"]),
    "no safetensors": (other_bytes, ["model.safetensors"]),
    "pickle": (pickled, ["pytorch_model.bin", "safetensors"]),
    "index that leaves the folder": (index_outside, ["../outside.safetensors"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "an adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        ["holds an adapter", "--adapter"],
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer"]),
    "impossible config": (change_config(num_key_value_heads=3), ["heads"]),
    "a size as text": (change_config(hidden_size="64"), ["hidden_size", "'64'"]),
    "half a channel": (change_config(hidden_size=64.5), ["hidden_size", "64.5"]),
    "larger than any array": (change_config(vocab_size=10**12), ["1000000000000"]),
    "half a token": (change_config(max_position_embeddings=1.5), ["context", "1.5"]),
    "an epsilon as text": (change_config(rms_norm_eps="1e-5"), ["eps", "'1e-5'"]),
    "a negative base": (change_config(rope_theta=-1), ["base", "-1"]),
    "a scaling by text": (change_config(rope_scaling=ROPE), ["factor", "'two'"]),
    "a scaling that is text": (change_config(rope_scaling="linear"), ["RoPE", "'linear'"]),
    "perhaps tied": (change_config(tie_word_embeddings="false"), ["tie_word_embeddings", "quotes"]),
    "an end token as text": (change_config(eos_token_id="2"), ["eos_token_id", "'2'"]),
    "end tokens in lists": (
        write("generation_config.json", b'{"eos_token_id": [[1]]}'),
        ["generation_config.json", "eos_token_id"],
    ),
    "deep JSON": (write("config.json", b"[" * 100_000), ["config.json", "JSON"]),
    "a template that is none": (change_tokenizer(chat_template=[3]), ["chat_template", "[3]"]),
    "a template without a name": (
        change_tokenizer(chat_template=[{"template": "x"}]),
        ["chat_template", "names"],
    ),
    "a template in Latin-1": (write("chat_template.jinja", b"\xe9"), ["jinja", "UTF-8"]),
    "a template with a loose end": (
        write("chat_template.jinja", b"{% break %}"),
        ["chat template", "outside loop"],
    ),
    "added tokens without text": (
        change_tokenizer(added_tokens_decoder={"5": {}}),
        ["added_tokens_decoder"],
    ),
    "added tokens without number": (write("added_tokens.json", b'{"a": "b"}'), ["added_tokens"]),
    "whole numbers as weights": (
        change_weights(whole_numbers),
        ["model.norm.weight", "int32", "floating-point"],
    ),
    "packed by half": (
        lambda folder: (
            change_weights(packed_by_half)(folder),
            change_config(quantization={"bits": 4, "group_size": 64})(folder),
        ),
        ["lm_head.biases", "[406, 1]"],
    ),
    "an index that names a link": (index_that_names_a_link, ["link", "model.safetensors"]),
    "no shards": (renamed("model-00001-of-00000.safetensors"), ["model-00001-of-00000"]),
    "GGUF": (renamed("model.gguf"), ["model.gguf", "safetensors"]),
    "a Git LFS pointer": (
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        ["Git LFS", "git lfs pull"],
    ),
    "a pipe": (pipe, ["model.safetensors is no file"]),
    "broken template": (broken_template, ["chat template", "no users here"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_checkpoints(name, tmp_path, capsys):
    spoil, words = CASES[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(), folder)
    spoil(folder)
    before = sorted(path.name for path in folder.iterdir())
    assert main(["generate", "--model", str(folder), "--prompt", "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mlxtx: ") and captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("blobs", ["blobs", "elsewhere"])
def test_only_the_hubs_cache_links_shards(blobs, tmp_path):
    """There snapshots/REVISION/FILE is a link to ../../blobs/HASH."""
    folder = tmp_path / "snapshots" / "main"
    shutil.copytree(tiny_folder(), folder)
    (tmp_path / blobs).mkdir()
    names = list(mx.load(str(folder / "model.safetensors")))
    (folder / "model.safetensors").rename(tmp_path / blobs / "a1b2")
    (folder / "model.safetensors").symlink_to(f"../../{blobs}/a1b2")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    code = main(["generate", "--model", str(folder), "--prompt", "x", "--max-tokens", "1"])
    assert code == (0 if blobs == "blobs" else 2)


def test_what_others_wrote_stays_inert_in_an_error():
    error = MlxtxError("a name\nof two\r\nlines: \x1b[31m\u202e\x9b é 漢")
    assert str(error) == "a name of two lines: \\x1b[31m\\u202e\\x9b é 漢"


def test_remote_code_is_never_run(tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(), folder)
    proof = tmp_path / "it ran"
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Model: ...\n")
    change_config(auto_map={"AutoModelForCausalLM": "evil.Model"}, model_file="evil.py")(folder)
    assert main(["generate", "--model", str(folder), "--prompt", "x", "--max-tokens", "2"]) in (
        0,
        2,
    )
    assert not proof.exists()
    assert "Traceback" not in capsys.readouterr().err


def in_process(*arguments: str, stdout=None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlxtx", *arguments],
        stdout=stdout or subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("mlxtx: ")
    return done.stderr


def test_no_network(tmp_path):
    done = in_process(
        "generate",
        "--model",
        "someone/some-model",
        "--prompt",
        "x",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path),
    )
    assert "someone/some-model" in one_line(done) and "network" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk():
    with open("/dev/full", "w") as full:
        arguments = ["generate", "--model", str(tiny_folder()), "--prompt", "x"]
        done = in_process(*arguments, "--max-tokens", "4", stdout=full)
    assert "No space left on device" in one_line(done)


def test_a_saved_conversation_is_whole_or_not_there(tmp_path):
    from mlxtx.scripts.chat import Loop

    from tests.tiny_model import tiny_language_model

    loop = Loop(tiny_language_model().chat(), {}, False)
    loop.chat.messages = [{"role": "user", "content": "kept"}]
    loop.save(str(tmp_path / "talk.json"))
    before = (tmp_path / "talk.json").read_text()
    loop.chat.messages.append({"role": "user", "content": object()})  # cannot be written
    with pytest.raises((MlxtxError, TypeError)):
        loop.save(str(tmp_path / "talk.json"))
    assert (tmp_path / "talk.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    with pytest.raises(MlxtxError, match="cannot write"):
        loop.save(str(tmp_path / "no folder" / "talk.md"))
