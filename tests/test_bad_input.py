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


CASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "unknown family": (change_config(model_type="lama"), ["lama", "llama"]),
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
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer"]),
    "impossible config": (change_config(num_key_value_heads=3), ["heads"]),
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

    from mlxtx.errors import MlxtxError
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
