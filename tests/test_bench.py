"""``mlxtx bench`` on the tiny model, with a stand-in for the other engine."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from mlxtx.scripts import bench

from mlxtx.cli import main
from tests.tiny_model import tiny_folder

SMALL = ["--prompt-lengths", "8,20", "--new-tokens", "4", "--rounds", "2"]


def test_figures_of_every_round(capsys):
    assert main(["bench", "--model", str(tiny_folder()), *SMALL, "--kv", "plain", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [case["prompt"] for case in result["cases"]] == [8, 20]
    rounds = result["results"]["mlxtx"]
    assert len(rounds) == 2
    for answer in rounds:
        weights = sum(path.stat().st_size for path in tiny_folder().glob("*.safetensors"))
        assert answer["weight_bytes"] == pytest.approx(weights, rel=0.05)
        for row in answer["cases"]:
            assert row["prefill_tokens_per_second"] > 0 < row["decode_tokens_per_second"]
            assert answer["weight_bytes"] < row["peak_bytes"] < answer["process_peak_bytes"]


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """An interpreter with an mlx_lm of its own making: it decodes with mlxtx's tiny model."""
    package = tmp_path / "mlx_lm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "utils.py").write_text(
        "from mlxtx.checkpoint import load_model as load\n"
        "def load_model(path):\n"
        "    return load(path)\n"
    )
    (package / "generate.py").write_text(
        "import mlx.core as mx\n"
        "def generate_step(prompt, model, max_tokens, kv_bits=None, kv_group_size=None):\n"
        "    cache = model.make_cache()\n"
        "    for _ in range(max_tokens):\n"
        "        prompt = mx.argmax(model(prompt[None], cache, last=1)[0], -1)\n"
        "        yield prompt.item(), None\n"
    )
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


def test_against_another_engine(capsys, peer):
    command = ["bench", "--model", str(tiny_folder()), *SMALL, "--kv", "plain,k8v8g32,k8v4g32"]
    assert main([*command, "--against", "mlx-lm", "--peer-python", str(peer)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("start, import") and lines[1].startswith("start, --help")
    numbers = {line[:44].strip(): line[44:].split() for line in lines[3:]}
    assert len(numbers["load (s)"]) == len(numbers["8 + 4 tokens, plain: decode (tokens/s)"]) == 3
    assert len(numbers["8 + 4 tokens, k8v8g32: peak (MB)"]) == 3
    assert len(numbers["8 + 4 tokens, k8v4g32: peak (MB)"]) == 1  # the other engine has no such


def test_ratio_is_the_median_of_the_pairs():
    assert bench.row("x", [[1.0, 2.0, 9.0], [2.0, 1.0, 3.0]]).split() == [
        "x",
        "2.000",
        "2.000",
        "2.000",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-lengths", "a"], "--prompt-lengths takes numbers"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--model", "/no/such"], "/no/such"),
        (["--config", "x.json"], "give --random too"),
        (["--random", "float32"], "leave out --model"),
        (["--against", "mlx-lm", "--dtype", "float16"], "two different models"),
        (["--against", "mlx-lm", "--peer-python", "/no/python"], "cannot start /no/python"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    assert main(["bench", "--model", str(tiny_folder()), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is not None, reason="mlx-lm is installed")
def test_a_missing_engine_says_how_to_name_one(capsys):
    assert main(["bench", "--model", str(tiny_folder()), "--against", "mlx-lm"]) == 2
    assert "--peer-python" in capsys.readouterr().err


def test_a_config_that_is_not_there_is_named(tmp_path, capsys):
    missing = str(tmp_path / "none.json")
    assert main(["bench", "--random", "float32", "--config", missing, *SMALL]) == 2
    assert f"cannot read {missing}" in capsys.readouterr().err
